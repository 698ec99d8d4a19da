"""Jobs on a Ray cluster: a verb of ours that runs there, sent over http with the package that it needs."""

import asyncio
import atexit
import difflib
import getpass
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from onestage.cluster import connection, local_cluster
from onestage.errors import DONE, FAILED, INTERRUPTED, InputError

JOB: Final = "ONESTAGE_JOB"
"""The environment variable with a job's own id, in the job."""
VERBS: Final = ("train", "evaluate")
STOP_S: Final = 60
"""So long a job may take to save a checkpoint when it is stopped; Ray's own is 3."""
STOPPED_S: Final = STOP_S + 15
REQUEST_S: Final = 8.0
UPLOAD_S: Final = 120.0
CONNECT_S: Final = 5.0
POLL_S: Final = 0.5
SILENT_S: Final = 30.0
"""Without a word of the job so long, its state is asked for."""
AWAY_S: Final = 120.0
"""So long the cluster may not answer while a job is followed."""
ENDED: Final = ("SUCCEEDED", "FAILED", "STOPPED")
IN_A_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
PATHS: Final = ("data.root", "storage", "detector.weights")


@dataclass(frozen=True)
class JobInfo:
    """What the cluster knows of a job. ``state`` is Ray's in small letters, ``age_s`` counts from its start."""

    id: str
    state: str
    age_s: float
    user: str
    verb: str
    command: str
    tracking: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state.upper() in ENDED


def runtime_env(cluster: Mapping[str, Any], *, driver_env: Mapping[str, str]) -> dict[str, Any]:
    """What Ray gives the processes of a driver: the variables that ``cluster.env`` names, and with ``cluster.ship``
    this package, which wins over the node's own. Nothing in a job, whose processes have what the job was given.
    """
    if IN_A_JOB in driver_env:
        return {}
    names = [*cluster["env"], "OMP_NUM_THREADS"]
    variables = {
        key: value
        for key, value in driver_env.items()
        if any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)
    }
    return {"env_vars": variables} | ({"py_modules": [str(_package())]} if cluster["ship"] else {})


def _package() -> Path:
    from onestage.cluster import wheel

    folder = Path(tempfile.mkdtemp(prefix="onestage-wheel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return wheel.unpacked(folder)


def _python() -> str:
    """For a shell on the node: the Python that is where this one is, as in a shared image, else the one on PATH."""
    return f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'


def address_of(given: str | None, configured: str | None = None) -> str:
    """Where jobs are sent, as http://HOST:PORT: as given, else the environment's, the config's, the local cluster's."""
    for address in (given, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"), configured):
        if address and address.startswith(("http://", "https://")):
            return address.rstrip("/")
        if address and address == given:
            raise InputError(f"address {address} takes no jobs: write http://HOST:8265, the cluster's dashboard")
    head = local_cluster.address()
    if head is None or (mine := local_cluster.find(head)) is None:
        raise InputError("no cluster to send jobs to: say --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    return mine.dashboard


def overrides_of_job(verb: str, overrides: Sequence[str], config: Mapping[str, Any], *, here: Path) -> list[str]:
    """The overrides as the job needs them: paths from the root, attached to its own cluster, no tracking address.

    >>> config = {"storage": "runs", "cluster": {"kind": "ray"}}
    >>> overrides_of_job("train", ["data.root=digits", "cluster.address=http://h:8265"], config, here=Path("/home"))
    ['data.root=/home/digits', 'storage=/home/runs', 'cluster=ray', 'cluster.address=auto', 'cluster.ship=false']
    """
    taken = ("cluster", "cluster.address", "cluster.ship", "storage", "tracking.uri", "output")
    kept = [_absolute(one, here) for one in overrides if one.lstrip("+").partition("=")[0] not in taken]
    kept.append(_absolute(f"storage={config['storage']}", here))
    if verb != "train":
        return kept
    kept.append(f"cluster={config['cluster']['kind']}")
    return kept + (["cluster.address=auto", "cluster.ship=false"] if config["cluster"]["kind"] == "ray" else [])


def _absolute(override: str, here: Path) -> str:
    key, _, value = override.partition("=")
    if key not in PATHS or not value or value == "null" or "://" in value or value[0] in "/'\"":
        return override
    return f"{key}={here / value}"


def submit(verb: str, overrides: Sequence[str], *, address: str | None = None, config: dict[str, Any]) -> str:
    """Sends a job and returns its id. ``overrides`` are those of ``config``; before them an evaluation has its RUN.

    Raises InputError where the cluster can't be reached, or refuses the token or the job.
    """
    from onestage.tracking.redaction import redact
    from onestage.tracking.tracker import store_uri

    cluster = config["cluster"]
    where = address_of(address, cluster["address"])
    job = f"{verb}-{datetime.now():%m%d-%H%M%S}-{secrets.token_hex(2)}"
    here = Path.cwd()
    runs = [str(here / one) if (here / one).is_file() else one for one in overrides if "=" not in one]
    settings = overrides_of_job(verb, [one for one in overrides if "=" in one], config, here=here)
    uri = store_uri(config)
    client = _client(where)
    client.limit_s = UPLOAD_S
    environment = runtime_env(cluster, driver_env=os.environ)
    environment["env_vars"] = {
        **environment.get("env_vars", {}),
        **({"MLFLOW_TRACKING_URI": uri} if uri is not None else {}),
        JOB: job,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    with _told(where):
        client.submit_job(
            # No shell stays in between, and nothing of the overrides is for it to read.
            entrypoint=f"exec {_python()} " + shlex.join(["-m", "onestage.cli", verb, *runs, *settings]),
            submission_id=job,
            runtime_env=environment,
            metadata={
                "onestage.user": _user(),
                "onestage.verb": verb,
                "onestage.command": redact(shlex.join(["onestage", verb, *overrides])),
                "onestage.tracking": redact(uri or ""),
            },
        )
    return job


def submit_and_follow(verb: str, overrides: Sequence[str], config: dict[str, Any]) -> int:
    """Sends a job and shows what it writes, to its end; the job's exit code. Ctrl-C leaves it running."""
    where = address_of(None, config["cluster"]["address"])
    job = submit(verb, overrides, address=where, config=config)
    print(f"job {job}", file=sys.stderr)
    return follow(job, address=where)


def follow(job: str, *, address: str | None = None) -> int:
    """Shows what a job writes, from its first line to its end, and returns its exit code."""
    where = address_of(address)
    known(job, address=where)
    try:
        asyncio.run(_tail(_client(where), job, where))
    except KeyboardInterrupt:
        again = f"{job} --address {where}"
        print(
            f"\nonestage: job {job} goes on. Follow it again: onestage logs -f {again}; end it: onestage stop {again}",
            file=sys.stderr,
        )
        return INTERRUPTED
    info = known(job, address=where)
    if info.exit_code is not None:
        return info.exit_code
    if info.state == "failed" and info.message.strip():
        print(f"onestage: job {job} failed: {info.message.strip().splitlines()[-1]}", file=sys.stderr)
    return DONE if info.state == "succeeded" else FAILED


async def _tail(client: Any, job: str, where: str) -> None:
    """Prints the job's log until it has ended; a lost connection is made again, and what was shown passed over."""
    shown = 0
    heard = time.monotonic()
    while True:
        read = 0
        ended = False
        lines = client.tail_job_logs(job)
        try:
            ended = str(client.get_job_status(job)) in ENDED
            heard = time.monotonic()
            while True:
                text = await asyncio.wait_for(anext(lines), SILENT_S)
                heard = time.monotonic()
                read += len(text)
                if read > shown:
                    print(text[-(read - shown) :], end="", flush=True)
                    shown = read
        except (StopAsyncIteration, TimeoutError):
            if ended:
                return
        except Exception as error:
            if time.monotonic() - heard > AWAY_S:
                raise InputError(
                    f"the cluster at {where} does not answer any more ({_reason(error)}): "
                    f"onestage logs -f {job} goes on"
                ) from error
        finally:
            await lines.aclose()
        await asyncio.sleep(POLL_S)


def logs(job: str, *, address: str | None = None) -> str:
    """What a job has written until now."""
    where = address_of(address)
    known(job, address=where)
    with _told(where):
        return str(_client(where).get_job_logs(job))


def stop(job: str, *, address: str | None = None) -> JobInfo:
    """Asks a job to end (SIGTERM), and waits for it: after STOP_S seconds Ray kills it."""
    where = address_of(address)
    info = known(job, address=where)
    if info.ended:
        return info
    print(f"asked {job} to end; it has {STOP_S} s to save a checkpoint", file=sys.stderr)
    with _told(where):
        _client(where).stop_job(job)
    end = time.monotonic() + STOPPED_S
    while not (info := known(job, address=where)).ended:
        if time.monotonic() > end:
            raise InputError(
                f"job {job} has not ended within {STOPPED_S} s: see onestage logs {job}, then stop it again"
            )
        time.sleep(POLL_S)
    return info


def known(job: str, *, address: str | None = None) -> JobInfo:
    """A job by its id. Raises InputError, with the nearest id, where the cluster has none such."""
    found = {info.id: info for info in jobs(address=address, everybodys=True)}
    if job not in found:
        near = difflib.get_close_matches(job, found, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "onestage list shows those that are there"
        raise InputError(f"no job {job!r} at {address_of(address)}: {hint}")
    return found[job]


def jobs(*, address: str | None = None, everybodys: bool = False) -> list[JobInfo]:
    """The jobs that this user has submitted, newest first."""
    where = address_of(address)
    with _told(where):
        details = [one for one in _client(where).list_jobs() if one.submission_id]
    infos = [_info(one) for one in sorted(details, key=lambda one: one.start_time or 0, reverse=True)]
    return [info for info in infos if everybodys or info.user == _user()]


def links(infos: Sequence[JobInfo]) -> dict[str, str]:
    """By job, where its MLflow run is to be seen; without those that can't be looked up in good time."""
    from onestage.tracking.job_links import runs_of_jobs
    from onestage.tracking.redaction import redact, without_user

    mine = os.environ.get("MLFLOW_TRACKING_URI", "")
    found: dict[str, str] = {}
    for uri in {info.tracking for info in infos if info.tracking}:
        of_it = [info.id for info in infos if info.tracking == uri]
        found |= runs_of_jobs(mine if redact(mine) == uri else without_user(uri), of_it)
    return found


def _info(details: Any) -> JobInfo:
    metadata = details.metadata or {}
    until = details.end_time or time.time() * 1000
    return JobInfo(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)).lower(),
        age_s=max(0.0, time.time() - (details.start_time or until) / 1000),
        user=metadata.get("onestage.user", ""),
        verb=metadata.get("onestage.verb", ""),
        command=metadata.get("onestage.command", ""),
        tracking=metadata.get("onestage.tracking", ""),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _client(where: str) -> Any:
    """Ray's client for jobs, with a limit on each request. Raises InputError where the cluster does not let us in."""
    connection.quiet()
    connection.show_token(where)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    parts = urlsplit(where)
    try:
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray dashboard at {where} ({error}): is the cluster up, and the address right?") from error
    os.environ["RAY_API_SERVER_ADDRESS"] = where  # Ray takes it, or RAY_ADDRESS, instead of what it is given
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        limit_s = REQUEST_S

        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=self.limit_s, **kwargs)

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _told(where):
        return Client(where)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What Ray's client raises, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise InputError(
                f"the cluster at {where} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, "
                f"its token"
            ) from error
        raise InputError(f"the cluster at {where} does not take the request: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Its first line, without the values of variables, which Ray may repeat."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"('?env_vars'?: *)\{.*", r"\1{…}", line)[:300]
