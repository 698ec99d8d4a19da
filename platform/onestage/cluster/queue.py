"""What takes jobs: a Ray cluster, Kubernetes or Slurm. All are asked the same."""

import difflib
import getpass
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from onestage.errors import InputError
from onestage.tracking.redaction import redact, without_user

ENDED: Final = ("succeeded", "failed", "stopped")
PATHS: Final = ("data.root", "storage", "detector.weights")
SENT_OTHERWISE: Final = ("cluster", "cluster.address", "cluster.ship", "storage", "tracking.uri")
OF_THE_SENDER: Final = ("cluster.slurm.",)
"""What only whoever sends a job has to know: a job's own cluster is Ray."""


@dataclass(frozen=True)
class JobInfo:
    """What the cluster knows of a job. ``state`` is Ray's in small letters, ``age_s`` counts from its start.

    ``tracking`` is its MLflow store, without a password; ``reason`` the last line of one that failed.
    """

    id: str
    state: str
    age_s: float
    user: str
    verb: str
    command: str
    tracking: str
    exit_code: int | None
    reason: str | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDED


class Queue(Protocol):
    """Takes jobs and knows of those it took; ``address`` is what ``--address`` calls it by.

    All methods raise InputError where it does not answer, refuses who asks, or has no such job.
    """

    address: str

    def submit(
        self, verb: str, overrides: Sequence[str], *, config: Mapping[str, Any], names: Sequence[str] = ()
    ) -> str:
        """Sends a job and returns its id. ``overrides`` are those of ``config``; before them the verb has ``names``,
        such as the RUN of an evaluation.
        """

    def follow(self, job: str) -> int:
        """Shows what a job writes, from its first line to its end; its exit code. Ctrl-C leaves it running."""

    def logs(self, job: str) -> str:
        """What a job has written until now."""

    def stop(self, job: str) -> JobInfo:
        """Asks a job to end, so that it saves a checkpoint, and waits for it."""

    def get(self, job: str) -> JobInfo:
        """A job by its id. Raises InputError, with the nearest id, where there is none such."""

    def listed(self, *, everybodys: bool = False) -> list[JobInfo]:
        """The jobs that this user has submitted, newest first."""


def of_config(cluster: Mapping[str, Any]) -> Queue:
    """What takes the jobs of a config's ``cluster``. Raises InputError where nothing does."""
    return at("slurm" if cluster["kind"] == "slurm" else cluster["address"])


def at(address: str | None) -> Queue:
    """What ``--address`` names: http://HOST:8265 of a Ray cluster, slurm; None is what the environment says."""
    if address == "slurm":
        from onestage.cluster.slurm import SlurmJobs

        return SlurmJobs()
    from onestage.cluster import jobs

    return jobs.Jobs(jobs.address_of(address))


def rendered(verb: str, overrides: Sequence[str], *, config: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """What `submit` would give to Slurm, as text; nothing is asked and nothing sent."""
    if config["cluster"]["kind"] == "slurm":
        from onestage.cluster import slurm

        return slurm.rendered(verb, overrides, config=config, names=names)
    raise InputError("--render shows what a batch system is given: say cluster=slurm")


def submit_and_follow(
    verb: str, overrides: Sequence[str], config: Mapping[str, Any], *, names: Sequence[str] = ()
) -> int:
    """Sends a job to where the config says and shows what it writes, to its end; the job's exit code."""
    queue = of_config(config["cluster"])
    job = queue.submit(verb, overrides, config=config, names=names)
    print(f"job {job}", file=sys.stderr)
    return queue.follow(job)


def links(infos: Sequence[JobInfo]) -> dict[str, str]:
    """By job, where its MLflow run is to be seen; without those that can't be looked up in good time."""
    from onestage.tracking.job_links import runs_of_jobs

    mine = os.environ.get("MLFLOW_TRACKING_URI", "")
    stores: dict[str, list[str]] = {}
    for info in infos:
        if info.tracking:
            uri = mine if redact(mine) == info.tracking else without_user(info.tracking)
            stores.setdefault(uri, []).append(info.id)
    return runs_of_jobs(stores)


def new_id(verb: str) -> str:
    """Of a job that is submitted now."""
    return f"{verb}-{datetime.now():%m%d-%H%M%S}-{secrets.token_hex(2)}"


def found(job: str, infos: Sequence[JobInfo], *, where: str) -> JobInfo:
    """The one with that id. Raises InputError, with the nearest id, where there is none such."""
    known = {info.id: info for info in infos}
    if job not in known:
        near = difflib.get_close_matches(job, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "onestage list shows those that are there"
        raise InputError(f"no job {job!r} at {where}: {hint}")
    return known[job]


def command(verb: str, overrides: Sequence[str], names: Sequence[str]) -> str:
    """What the user typed, as others may see it."""
    return redact(shlex.join(["onestage", verb, *names, *overrides]))


def words_of_job(verb: str, overrides: Sequence[str], config: Mapping[str, Any], *, names: Sequence[str]) -> list[str]:
    """What comes behind ``onestage`` in the job itself; files of this folder are named from the root."""
    if config["cluster"]["kind"] == "local":
        raise InputError("cluster=local: a job has a cluster around it; leave that out, or say cluster=none")
    here = Path.cwd()
    runs = [str(here / one) if (here / one).is_file() else one for one in names]
    return [verb, *runs, *overrides_of_job(overrides, config, here=here)]


def overrides_of_job(overrides: Sequence[str], config: Mapping[str, Any], *, here: Path) -> list[str]:
    """The overrides as the job needs them: paths from the root, attached to its own cluster, no tracking address.

    >>> config = {"storage": "runs", "cluster": {"kind": "ray"}}
    >>> overrides_of_job(["data.root=digits", "cluster.address=http://h:8265"], config, here=Path("/home"))
    ['data.root=/home/digits', 'storage=/home/runs', 'cluster=ray', 'cluster.address=auto', 'cluster.ship=false']
    """
    from onestage.config import quoted

    kind = "none" if config["cluster"]["kind"] == "none" else "ray"
    keys = [one.lstrip("+~").partition("=")[0] for one in overrides]
    kept = [
        one
        for one, key in zip(overrides, keys, strict=True)
        if key not in SENT_OTHERWISE and not key.startswith(OF_THE_SENDER)
    ]
    kept += [f"storage={quoted(config['storage'])}", f"cluster={kind}"]
    kept += ["cluster.address=auto", "cluster.ship=false"] if kind == "ray" else []
    return [_absolute(one, here) for one in kept]


def _absolute(override: str, here: Path) -> str:
    """A path from the root, as Hydra reads it back.

    >>> [_absolute(one, Path("/a (b)")) for one in ("data.root='my shards'", "data.root=s3://b/x", "seed=1")]
    ["data.root='/a (b)/my shards'", 'data.root=s3://b/x', 'seed=1']
    """
    from onestage.config import quoted

    key, _, value = override.partition("=")
    if key.lstrip("+") not in PATHS or not value or value == "null" or "://" in value:
        return override
    if value[0] in "'\"" and value[-1] == value[0]:
        value = value[1:-1].replace(f"\\{value[0]}", value[0])
    return f"{key}={quoted(str(here / value))}"


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
