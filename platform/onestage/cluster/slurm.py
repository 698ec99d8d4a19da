"""Jobs in Slurm: each an allocation with a Ray of its own; sent, followed and ended with Slurm's own commands.

A job has a folder below the cache, ``slurm/ID``, which its nodes must see under the same name: the log, the token of
its Ray, the copy of this package that it runs, and its exit code once it has one.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from onestage.cluster import slurm_commands, slurm_script
from onestage.cluster.queue import JobInfo, command, found, new_id, user, words_of_job
from onestage.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, InputError
from onestage.tracking.redaction import redact

POLL_S: Final = 2.0
TOLD_S: Final = 60.0
STOP_S: Final = 130
"""So long a job that is stopped may take to save a checkpoint."""
KILLED_S: Final = 60.0
STATES: Final = {
    "COMPLETED": "succeeded",
    "CANCELLED": "stopped",
    "PREEMPTED": "stopped",
    **dict.fromkeys(("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"), "failed"),
    **dict.fromkeys(("CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"), "pending"),
}
"""Ours by Slurm's; all others are of jobs that run."""


class SlurmJobs:
    """The jobs of the Slurm whose commands are on this machine's PATH.

    All methods raise InputError where it does not answer, refuses a job, or has no such job.
    """

    address: str = "slurm"

    def submit(
        self, verb: str, overrides: Sequence[str], *, config: Mapping[str, Any], names: Sequence[str] = ()
    ) -> str:
        """Sends a job and returns its id; Slurm's own number is in `status`."""
        from onestage.cluster.jobs import packages_in
        from onestage.tracking.tracker import store_uri

        job, uri = new_id(verb), store_uri(config)
        environment = dict(os.environ) | ({"MLFLOW_TRACKING_URI": uri} if uri is not None else {})
        config = _as_it_will_run(verb, config, uri)
        script = _script(job, verb, overrides, config, names, environment)
        folder = _folder(job)
        folder.mkdir(mode=0o700, parents=True)
        told = command(verb, overrides, names)
        try:
            if config["cluster"]["ship"]:
                with tempfile.TemporaryDirectory(dir=folder) as built:
                    (folder / "code").mkdir()
                    for package in packages_in(Path(built)):
                        package.rename(folder / "code" / package.name)
            (folder / "job.sh").write_text(script, encoding="utf-8")
            argv = ["sbatch", "--parsable", f"--comment={' '.join(told.split())}", str(folder / "job.sh")]
            number = slurm_commands.call(argv, environment).partition(";")[0]  # behind it may be a cluster's name
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        known = {
            "id": job,
            "number": number.strip(),
            "submitted": time.time(),
            "user": user(),
            "verb": verb,
            "command": told,
            "tracking": redact(uri or ""),
        }
        (folder / "job.json").write_text(json.dumps(known), encoding="utf-8")
        return job

    def follow(self, job: str) -> int:
        """Shows what a job writes, from its first line to its end; its exit code. Ctrl-C leaves it running."""
        info = self.get(job)
        log, shown, told, rest = _folder(info.id) / "log", 0, 0.0, b""
        try:
            while True:
                info = self.get(info.id)  # before the log is read, which has all by then of a job that has ended
                with _opened(log) as file:
                    file.seek(shown)
                    read = rest + file.read()
                    shown = file.tell()
                cut = len(read) if info.ended else max(read.rfind(b"\n"), read.rfind(b"\r")) + 1
                lines, rest = read[:cut], read[cut:]  # a secret that comes in two parts would not be known for one
                if lines:
                    print(redact(lines.decode(errors="replace")), end="", flush=True)
                if info.ended:
                    break
                if info.state == "pending" and time.monotonic() - told > TOLD_S:
                    told = time.monotonic()
                    print(f"waiting in Slurm's queue: {info.reason or 'for resources'}", file=sys.stderr)
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            print(
                f"\nonestage: job {info.id} goes on. Follow it again: onestage logs -f {info.id} --address slurm; "
                f"end it: onestage stop {info.id} --address slurm",
                file=sys.stderr,
            )
            return INTERRUPTED
        if info.exit_code is not None:
            return info.exit_code
        because = f": {info.reason}" if info.reason else ""
        print(f"onestage: job {info.id} {info.state}{because}", file=sys.stderr)
        return {"succeeded": DONE, "stopped": PREEMPTED}.get(info.state, FAILED)

    def logs(self, job: str) -> str:
        """What a job has written until now."""
        with _opened(_folder(self.get(job).id) / "log") as file:
            return redact(file.read().decode(errors="replace"))

    def stop(self, job: str) -> JobInfo:
        """Asks a job to end, and waits for it: after STOP_S seconds Slurm kills it."""
        info = self.get(job)
        if info.ended:
            return info
        number = self._number(info.id)
        if info.state == "pending":
            slurm_commands.call(["scancel", number])
        else:
            print(f"asked {info.id} to end; it has {STOP_S} s to save a checkpoint", file=sys.stderr)
            slurm_commands.call(["scancel", "--batch", "--signal=TERM", number])
        asked = time.monotonic()
        killed = info.state == "pending"
        while not (info := self.get(info.id)).ended:
            waited = time.monotonic() - asked
            if waited > STOP_S and not killed:
                killed = True
                slurm_commands.call(["scancel", number])
            if waited > STOP_S + KILLED_S:
                raise InputError(f"job {info.id} was told to end, and still runs: see `scontrol show job {number}`")
            time.sleep(POLL_S)
        return info

    def get(self, job: str) -> JobInfo:
        """A job by its id, or by Slurm's number. Raises InputError, with the nearest id, where there is none such."""
        mine = _mine()
        job = next((one["id"] for one in mine.values() if one["number"] == job), job)
        if job in mine:
            return _infos({job: mine[job]}, slurm_commands.queued([mine[job]["number"]]))[0]
        return found(job, self.listed(everybodys=True), where="Slurm")

    def listed(self, *, everybodys: bool = False) -> list[JobInfo]:
        """The jobs that this user has submitted, newest first; of others' only what Slurm still has in its queue."""
        mine, queued = _mine(), slurm_commands.queued(None)
        infos = _infos(mine, queued)
        if everybodys:
            infos += [_of_queue(one) for one in queued.values() if one["name"] not in mine]
        return sorted(infos, key=lambda info: info.age_s)

    def _number(self, job: str) -> str:
        return str(_mine()[job]["number"]) if job in _mine() else _number_of_name(job)


def rendered(verb: str, overrides: Sequence[str], *, config: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """The script of a job that would be sent now."""
    from onestage.tracking.tracker import store_uri

    uri = store_uri(config)
    environment = dict(os.environ) | ({"MLFLOW_TRACKING_URI": uri} if uri is not None else {})
    return _script(new_id(verb), verb, overrides, _as_it_will_run(verb, config, uri), names, environment)


def _script(
    job: str,
    verb: str,
    overrides: Sequence[str],
    config: Mapping[str, Any],
    names: Sequence[str],
    environment: Mapping[str, str],
) -> str:
    cluster = config["cluster"]
    asked = slurm_script.allocation(cluster)
    words = words_of_job(verb, overrides, config, names=names)
    words += [f"cluster.gpus_per_worker={asked.gpus_per_worker:g}"]
    again, begun = [one for one in words if not one.startswith("resume=")], ""
    if verb == "sweep" and not names:
        name = config["sweep"]["name"] or job
        words = [one for one in words if not one.startswith("sweep.name=")] + [f"sweep.name={name}"]
        begun = f"{config['storage']}/sweeps/{name}/sweep.json"
        begun = begun if "://" in begun else str(Path.cwd() / begun)
        kept = ("storage=", "cluster")
        again = ["sweep", "resume", name, *(one for one in words if one.startswith(kept))]
    secret = next((one for one in words if redact(one) != one), None)
    if secret is not None:
        raise InputError(f"{redact(secret)}: a secret would be in the job's script; have it in the environment instead")
    return slurm_script.script(
        job=job,
        verb=verb,
        first=words,
        again=again,
        begun=begun,
        folder=_folder(job),
        cluster=cluster,
        environment=environment,
    )


def _as_it_will_run(verb: str, config: Mapping[str, Any], uri: str | None) -> dict[str, Any]:
    """The config, with the cluster of the run that is gone on with; that the job asks for what the training will."""
    if config["cluster"]["slurm"] is None:
        raise InputError("this cluster is not Slurm's: say cluster=slurm")
    if verb != "train" or not config["resume"]:
        return dict(config)
    from onestage.cluster.resume import resumed

    return resumed(dict(config), uri)


def _folder(job: str) -> Path:
    from onestage.data import cache

    return cache.folder(None) / "slurm" / job


def _mine() -> dict[str, dict[str, Any]]:
    """What was noted of the jobs that were sent from here, by id."""
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in _folder("*").parent.glob("*/job.json")]
    return {str(note["id"]): note for note in notes}


def _opened(log: Path) -> Any:
    """The log, or nothing where there is none yet."""
    return open(log if log.is_file() else os.devnull, "rb")


def _infos(mine: Mapping[str, Mapping[str, Any]], queued: Mapping[str, Mapping[str, str]]) -> list[JobInfo]:
    past = slurm_commands.past([one["number"] for one in mine.values() if one["number"] not in queued])
    return [_info(note, queued.get(note["number"]) or past.get(note["number"])) for note in mine.values()]


def _info(note: Mapping[str, Any], slurm: Mapping[str, str] | None) -> JobInfo:
    """Of a job of ours, by its note, what Slurm says, and what it left."""
    left = _folder(note["id"]) / "exit_code"
    code = int(left.read_text()) if left.is_file() else None
    if slurm is not None:
        name = slurm["state"].split()[0]  # sacct says CANCELLED by 1000
        state = STATES.get(name, "running")
        reason = {"TIMEOUT": "its time limit", "NODE_FAIL": "a node was lost", "OUT_OF_MEMORY": "out of memory"}.get(
            name, slurm["reason"] if state == "pending" else None
        )
    else:  # Slurm forgets a job minutes after its end, where it keeps no accounts
        state, reason = "failed" if code is None else "succeeded", None
    if state in ("pending", "running"):
        code = None
    elif code is not None:
        state = {DONE: "succeeded", PREEMPTED: "stopped"}.get(code, "failed")
    return JobInfo(
        id=note["id"],
        state=state,
        age_s=time.time() - note["submitted"],
        user=note["user"],
        verb=note["verb"],
        command=note["command"],
        tracking=note["tracking"],
        exit_code=code,
        reason=reason,
    )


def _of_queue(one: Mapping[str, str]) -> JobInfo:
    """Of somebody else's job, what Slurm tells everybody."""
    note = {"id": one["name"], "number": one["number"], "submitted": float(one["submitted"]), "user": one["user"]}
    shown = {"verb": one["name"].partition("-")[0], "command": redact(one["comment"]), "tracking": ""}
    return replace(_info(note | shown, one), age_s=max(0.0, time.time() - float(one["submitted"])))


def _number_of_name(job: str) -> str:
    numbers = [number for number, one in slurm_commands.queued(None).items() if one["name"] == job]
    if not numbers:
        raise InputError(f"no job {job!r} in Slurm's queue: onestage list --address slurm shows those that are there")
    return numbers[0]
