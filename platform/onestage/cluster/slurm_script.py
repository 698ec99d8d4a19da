"""A job for Slurm, as a script for sbatch: what it asks for, checked, and before the lines that all jobs share."""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onestage.cluster.local_cluster import LOGIN, OBJECT_STORE_BYTES
from onestage.errors import InputError

BODY: Final = Path(__file__).with_name("slurm_job.sh")
FORMS: Final = {
    "partition": r"[\w.,+-]+",
    "account": r"[\w.@+-]+",
    "qos": r"[\w.+-]+",
    "constraint": r"[\w.,&|*:\[\]()-]+",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "gpu_type": r"[\w.-]+",
    "memory": r"\d+[KMGT]?",
}
"""The settings that stand in the script's directives, where a blank or a newline would begin another."""
DIRECTIVE: Final = re.compile(r"--([a-z][a-z-]*)(=[\w.,:/@%+&|*()\[\]-]+)?")
MODULE: Final = re.compile(r"[\w./+-]+")
OURS: Final = {
    "array", "chdir", "comment", "error", "export", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node",
    "open-mode", "output", "parsable", "signal", "test-only", "wait", "wrap", "cpus-per-task", "gres", "gpus",
    "gpus-per-node", "gpus-per-task", "no-kill",
    *(name if name != "memory" else "mem" for name in FORMS), "requeue",
}  # fmt: skip
NOT_EXPORTED: Final = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Allocation:
    """So many nodes, each with so much for Ray."""

    nodes: int
    cpus: int
    gpus: int
    gpus_per_worker: float


def allocation(cluster: Mapping[str, Any]) -> Allocation:
    """What ``cluster`` asks Slurm for. Raises InputError where its workers would not fit.

    >>> each = {"cpus_per_worker": 8, "gpus_per_worker": None}
    >>> size = {"nodes": None, "cpus_per_node": None, "gpus_per_node": 4}
    >>> allocation({"num_workers": 10, **each, "slurm": size})
    Allocation(nodes=3, cpus=32, gpus=4, gpus_per_worker=1)
    """
    slurm, workers = cluster["slurm"], cluster["num_workers"]
    for key in ("nodes", "cpus_per_node"):
        if slurm[key] is not None and slurm[key] < 1:
            raise InputError(f"cluster.slurm.{key} must be at least 1, got {slurm[key]}")
    if slurm["gpus_per_node"] is not None and slurm["gpus_per_node"] < 0:
        raise InputError(f"cluster.slurm.gpus_per_node must be at least 0, got {slurm['gpus_per_node']}")
    if workers < 1:
        raise InputError(f"cluster.num_workers must be at least 1, got {workers}")
    cpus_each = cluster["cpus_per_worker"] or 1
    gpus_each = cluster["gpus_per_worker"]
    if gpus_each is None:
        gpus_each = 1 if slurm["gpus_per_node"] else 0

    def fitting(cpus: int | None, gpus: int | None) -> int:
        """Workers of one node; all, where nothing limits them."""
        by_cpus = workers if cpus is None else cpus // cpus_each
        by_gpus = workers if gpus is None or not gpus_each else int(gpus / gpus_each)
        return int(min(by_cpus, by_gpus, workers))

    most = fitting(slurm["cpus_per_node"], slurm["gpus_per_node"])
    nodes = slurm["nodes"] or math.ceil(workers / max(most, 1))
    share = math.ceil(workers / nodes)
    cpus = slurm["cpus_per_node"] or share * cpus_each
    gpus = math.ceil(share * gpus_each) if slurm["gpus_per_node"] is None else slurm["gpus_per_node"]
    if fitting(cpus, gpus) * nodes < workers:
        raise InputError(
            f"{workers} workers of {cpus_each} CPUs and {gpus_each:g} GPUs do not fit {nodes} nodes of {cpus} CPUs and "
            f"{gpus} GPUs: see cluster.slurm.nodes, cpus_per_node, gpus_per_node"
        )
    return Allocation(nodes, cpus, gpus, gpus_each)


def check(slurm: Mapping[str, Any]) -> None:
    """Raises InputError for a setting that is not what sbatch or the script could take."""
    for key, form in FORMS.items():
        if slurm[key] is not None and not re.fullmatch(form, slurm[key]):
            raise InputError(f"cluster.slurm.{key}={slurm[key]!r} is none that sbatch takes")
    for one in slurm["directives"]:
        named = DIRECTIVE.fullmatch(one)
        if named is None:
            raise InputError(f"cluster.slurm.directives: {one!r} is no --name or --name=value without blanks")
        if named[1] in OURS:
            raise InputError(f"cluster.slurm.directives: --{named[1]} is for onestage to say: see cluster.slurm.*")
    for one in slurm["modules"]:
        if not MODULE.fullmatch(one):
            raise InputError(f"cluster.slurm.modules: {one!r} is no module's name")
    if not 30 <= slurm["warn_s"] <= 65535:
        raise InputError(f"cluster.slurm.warn_s must be from 30 to 65535 s, got {slurm['warn_s']}")


def exported(cluster: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The variables by name that the job gets of the sender's: a login's, the store's, those of ``cluster.env``."""
    from onestage.cluster.jobs import named_variables

    login = {name for name in environment if LOGIN.fullmatch(name) or name == "MLFLOW_TRACKING_URI"}
    return sorted((login | set(named_variables(cluster, environment))) - {NOT_EXPORTED})


def script(
    *,
    job: str,
    verb: str,
    first: Sequence[str],
    again: Sequence[str],
    begun: str,
    folder: Path,
    cluster: Mapping[str, Any],
    environment: Mapping[str, str],
) -> str:
    """The whole of it. ``first`` are the words behind ``onestage``; ``again`` those of a job that is queued again, once
    a training has its id (which the script adds) or the file ``begun`` is there. ``folder`` is the job's own.
    """
    slurm, asked = cluster["slurm"], allocation(cluster)
    check(slurm)
    if re.search(r"[\s\"'%\\]", str(folder)):
        raise InputError(f"the folder of jobs {folder} has blanks, quotes or % in it: set ONESTAGE_CACHE to another")
    limited = {"partition", "account", "qos", "constraint", "time"}
    lines = [
        f"--job-name={job}",
        f"--output={folder}/log",
        "--open-mode=append",
        *(f"--{key}={slurm[key]}" for key in FORMS if key in limited and slurm[key] is not None),
        f"--nodes={asked.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={asked.cpus}",
    ]
    if asked.gpus:
        lines.append("--gres=gpu:" + (f"{slurm['gpu_type']}:" if slurm["gpu_type"] else "") + str(asked.gpus))
    if slurm["memory"] is not None:
        lines.append(f"--mem={slurm['memory']}")
    lines += [
        f"--signal=B:USR1@{slurm['warn_s']}",
        "--requeue" if slurm["requeue"] else "--no-requeue",
        "--export=" + ",".join(exported(cluster, environment)),
        *(["--no-kill"] if cluster["min_workers"] not in (None, cluster["num_workers"]) else []),
        *slurm["directives"],
    ]
    python = [*slurm["within"], slurm["python"] or sys.executable]
    settings = {
        "job": job,
        "verb": verb,
        "folder": str(folder),
        "begun": begun,
        "cpus": str(asked.cpus),
        "gpus": str(asked.gpus),
        "memory": str(OBJECT_STORE_BYTES),
        "wait_s": f"{cluster['start_timeout_s']:g}",
        "requeue": "true" if slurm["requeue"] else "false",
    }
    arrays = {"modules": slurm["modules"], "python": python, "first": first, "again": again}
    return "\n".join(
        [
            "#!/bin/bash -l" if slurm["modules"] else "#!/bin/bash",  # a login shell has `module`
            *(f"#SBATCH {line}" for line in lines),
            f"# To be sent by hand: mkdir -p -m 700 {folder} && sbatch FILE",
            "",
            *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
            *(f"{name}=({shlex.join(values)})" for name, values in arrays.items()),
            "",
            BODY.read_text(encoding="utf-8"),
        ]
    )
