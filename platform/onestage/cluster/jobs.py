"""Jobs on a Ray cluster: a verb of ours that runs there, sent over http with the package that it needs."""

import asyncio
import atexit
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from onestage.cluster import connection, local_cluster
from onestage.cluster.connection import first_line
from onestage.cluster.job import HTTP, JOB_VARIABLE
from onestage.cluster.queue import ENDED, JobInfo, command, found, new_id, user, words_of_job
from onestage.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, InputError
from onestage.tracking.origin import CODE_FOLDER, code
from onestage.tracking.redaction import redact

STOP_S: Final = 130
"""So long a job that is stopped may take to end: its workers have 120 s to save. Ray's own is 3."""
STOPPED_S: Final = STOP_S + 15
REQUEST_S: Final = 30.0
"""For each request, the upload of the package among them."""
CONNECT_S: Final = 5.0
POLL_S: Final = 0.5
SILENT_S: Final = 30.0
"""Without a word of the job so long, its state is asked for."""
AWAY_S: Final = 120.0
"""So long the cluster may not answer while a job is followed."""
IN_A_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
SHIPPED: Final = "onestage-shipped-"
LEFT_S: Final = 3600.0


class Jobs:
    """The jobs of the cluster whose dashboard is at ``address``, http://HOST:PORT.

    All methods raise InputError where the cluster does not answer, refuses the token, or has no such job.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._shown = redact(address)
        self._client = _client(address)

    def submit(
        self, verb: str, overrides: Sequence[str], *, config: Mapping[str, Any], names: Sequence[str] = ()
    ) -> str:
        """Sends a job and returns its id. ``overrides`` are those of ``config``; before them the verb has ``names``,
        such as the RUN of an evaluation.
        """
        from onestage.tracking.tracker import store_uri

        job, words, uri = new_id(verb), words_of_job(verb, overrides, config, names=names), store_uri(config)
        environment = _sent_along(config["cluster"], os.environ)
        environment["env_vars"] |= {
            **({"MLFLOW_TRACKING_URI": uri} if uri is not None else {}),
            JOB_VARIABLE: job,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",  # see heed_stop
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
        }
        with self._told():
            self._client.submit_job(
                # No shell stays in between, and nothing of the overrides is for it to read.
                entrypoint=f"exec {_python()} " + shlex.join(["-m", "onestage.cli", *words]),
                submission_id=job,
                runtime_env=environment,
                metadata={
                    "onestage.user": user(),
                    "onestage.verb": verb,
                    "onestage.command": command(verb, overrides, names),
                    "onestage.tracking": redact(uri or ""),
                },
            )
        return job

    def follow(self, job: str) -> int:
        """Shows what a job writes, from its first line to its end; its exit code. Ctrl-C leaves it running."""
        try:
            self.get(job)
            asyncio.run(self._tail(job))
            info = self.get(job)
        except KeyboardInterrupt:
            again = f"{job} --address {self._shown}"
            print(
                f"\nonestage: job {job} goes on. Follow it again: onestage logs -f {again}; end it: "
                f"onestage stop {again}",
                file=sys.stderr,
            )
            return INTERRUPTED
        if info.exit_code is not None and info.exit_code >= 0:
            return info.exit_code
        because = f": {info.reason}" if info.reason else ""
        print(f"onestage: job {job} {info.state}{because}", file=sys.stderr)
        return {"succeeded": DONE, "stopped": PREEMPTED}.get(info.state, FAILED)

    async def _tail(self, job: str) -> None:
        """Prints the job's log until it has ended; a lost connection is made again, and what was shown passed over.

        Whole lines only: a secret that comes in two parts would not be known for one. A connection that is lost looks
        like a log's end. So what comes last is asked for once the job has ended.
        """
        shown = 0
        heard = time.monotonic()
        while True:
            known, rest = shown, ""
            try:
                ended = self._client.get_job_status(job).value.lower() in ENDED
                heard = time.monotonic()
                if ended:
                    print(redact(self._client.get_job_logs(job)[shown:]), end="", flush=True)
                    return
                async for text in _until_silent(self._client.tail_job_logs(job)):
                    heard = time.monotonic()
                    rest, known = rest + text[known:], max(known - len(text), 0)
                    lines = rest[: max(rest.rfind("\n"), rest.rfind("\r")) + 1]
                    if lines:
                        print(redact(lines), end="", flush=True)
                        rest, shown = rest[len(lines) :], shown + len(lines)
            except BrokenPipeError:  # nobody reads any more
                raise
            except Exception as error:
                if time.monotonic() - heard > AWAY_S:
                    raise InputError(
                        f"the cluster at {self._shown} does not answer any more ({_reason(error)}): "
                        f"onestage logs -f {job} goes on"
                    ) from error
            await asyncio.sleep(POLL_S)

    def logs(self, job: str) -> str:
        """What a job has written until now."""
        self.get(job)
        with self._told():
            return redact(self._client.get_job_logs(job))

    def stop(self, job: str) -> JobInfo:
        """Asks a job to end, and waits for it: after STOP_S seconds Ray kills it."""
        info = self.get(job)
        if info.ended:
            return info
        print(f"asked {job} to end; it has {STOP_S} s to save a checkpoint", file=sys.stderr)
        with self._told():
            self._client.stop_job(job)
        end = time.monotonic() + STOPPED_S
        while not (info := self.get(job)).ended:
            if time.monotonic() > end:
                raise InputError(
                    f"job {job} has not ended within {STOPPED_S} s: see onestage logs {job}, then stop it again"
                )
            time.sleep(POLL_S)
        return info

    def get(self, job: str) -> JobInfo:
        """A job by its id. Raises InputError, with the nearest id, where there is none such."""
        return found(job, self.listed(everybodys=True), where=self._shown)

    def listed(self, *, everybodys: bool = False) -> list[JobInfo]:
        """The jobs that this user has submitted, newest first."""
        with self._told():
            details = [one for one in self._client.list_jobs() if one.submission_id]
        infos = [_info(one) for one in sorted(details, key=lambda one: one.start_time or 0, reverse=True)]
        return [info for info in infos if everybodys or info.user == user()]

    @contextmanager
    def _told(self) -> Iterator[None]:
        with _told(self._shown):
            yield


def heed_stop() -> None:
    """In a job: makes a SIGTERM to this process of the SIGINT that Ray sends to all processes below a job's first.

    The others must not hear it, as they do not from now on: a training whose data loaders are gone can't save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="job-stop", daemon=True).start()


def runtime_env(cluster: Mapping[str, Any], *, driver_env: Mapping[str, str]) -> dict[str, Any]:
    """What Ray gives the processes of a driver: the variables that ``cluster.env`` names, and with ``cluster.ship``
    this package, which wins over the node's own. Nothing in a job, whose processes have what the job was given.
    """
    in_a_job = IN_A_JOB in driver_env or JOB_VARIABLE in driver_env
    return {} if in_a_job else _sent_along(cluster, driver_env)


def _sent_along(cluster: Mapping[str, Any], driver_env: Mapping[str, str]) -> dict[str, Any]:
    variables = named_variables(cluster, driver_env)
    return {"env_vars": variables} | ({"py_modules": _shipped()} if cluster["ship"] else {})


def named_variables(cluster: Mapping[str, Any], driver_env: Mapping[str, str]) -> dict[str, str]:
    """Those of the driver's environment that ``cluster.env`` names."""
    names = [*cluster["env"], "OMP_NUM_THREADS"]
    return {
        key: value
        for key, value in driver_env.items()
        if any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)
    }


def _shipped() -> list[str]:
    """The folders of what is shipped, which Ray uploads before it returns; they are there until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=SHIPPED))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for left in folder.parent.glob(f"{SHIPPED}*"):  # by processes that were killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
    return [str(package) for package in packages_in(folder)]


def packages_in(folder: Path) -> list[Path]:
    """This package's folders, put below ``folder``, with a note of the commit they are from."""
    from onestage.cluster import wheel

    packages = wheel.unpacked(folder)
    code().save(next(one for one in packages if one.name == wheel.PACKAGE.name) / CODE_FOLDER)
    return packages


def _python() -> str:
    """For a shell on the node: the Python that is where this one is, as in a shared image, else the one on PATH."""
    return f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'


def address_of(named: str | None = None) -> str:
    """Where jobs are sent, as http://HOST:PORT: as named, else by Ray's variables, else the local cluster.

    ``named`` is what --address or ``cluster.address`` says, which may come from RAY_ADDRESS. Raises InputError.
    """
    by_ray = [os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    candidates = [named]
    if named in (None, "auto", *by_ray):
        candidates = by_ray if any(by_ray) else [local_cluster.address()]
    for address in candidates:
        if address and address.startswith(HTTP):
            return address.rstrip("/")
        if address and (mine := local_cluster.find(address)) is not None:
            return mine.dashboard
    if told := next(filter(None, candidates), None):
        raise InputError(f"address {redact(told)} takes no jobs: write http://HOST:8265, the cluster's dashboard")
    raise InputError("no cluster to send jobs to: say --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")


def _info(details: Any) -> JobInfo:
    metadata = details.metadata or {}
    state = details.status.value.lower()
    last = next((line.strip() for line in reversed((details.message or "").splitlines()) if line.strip()), None)
    if (code := details.driver_exit_code) is not None and code < 0:
        perhaps = ", for want of memory perhaps" if code == -signal.SIGKILL else ""
        last = f"a signal ended it on its node ({signal.Signals(-code).name}{perhaps})"
    return JobInfo(
        id=details.submission_id,
        state=state,
        age_s=max(0.0, time.time() - details.start_time / 1000) if details.start_time else 0.0,
        user=metadata.get("onestage.user", ""),
        verb=metadata.get("onestage.verb", ""),
        command=metadata.get("onestage.command", ""),
        tracking=metadata.get("onestage.tracking", ""),
        exit_code=details.driver_exit_code,
        reason=redact(last) if last is not None and state == "failed" else None,
    )


def _client(address: str) -> Any:
    """Ray's client for jobs, with a limit on each request. Raises InputError where the cluster does not let us in."""
    connection.quiet()
    connection.show_token(address)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    shown, parts = redact(address), urlsplit(address)
    try:
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray dashboard at {shown} ({error}): is the cluster up, and the address right?") from error
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes it, or RAY_ADDRESS, instead of what it is given
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=REQUEST_S, **kwargs)

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _told(shown):
        return Client(address)


@contextmanager
def _told(shown: str) -> Iterator[None]:
    """What Ray's client raises, in one line."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except InputError:
        raise
    except AuthenticationError as error:
        raise InputError(
            f"the cluster at {shown} refuses the token: set RAY_AUTH_TOKEN_PATH=FILE, the file with its token "
            f"(of a cluster by `onestage cluster up`: clusters/NAME/token below its ~/.cache/onestage)"
        ) from error
    except (RuntimeError, OSError, KeyError, TypeError, ValueError) as error:  # also of answers that are no Ray's
        raise InputError(f"the cluster at {shown} does not take the request: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Its first line, without secrets, and without the values of variables, which Ray may repeat."""
    return redact(re.sub(r"('?env_vars'?: *)\{.*", r"\1{…}", first_line(error)))[:300]


async def _until_silent(lines: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """``lines`` until their end, or until none comes for SILENT_S."""
    try:
        while True:
            yield await asyncio.wait_for(anext(lines), SILENT_S)
    except (StopAsyncIteration, TimeoutError):
        return
    finally:
        await lines.aclose()
