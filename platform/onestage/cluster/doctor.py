"""``onestage doctor``: what would go wrong on this cluster, found before a training does.

``CHECKS`` is the list: each measures facts on the driver and on every node, each within a time of its own, and judges
them. A new check is one function that looks (``doctor_node``), one that judges (``doctor_verdicts``), and a line there.
"""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from onestage.cluster import doctor_hosts, doctor_node
from onestage.cluster import doctor_verdicts as verdicts
from onestage.cluster.doctor_hosts import START_S, Hosts, Measured
from onestage.cluster.doctor_node import Facts, Failure, Plan
from onestage.cluster.doctor_verdicts import CLUSTER, LEVELS, Level, Row
from onestage.data.store import StoreSettings, is_address
from onestage.errors import InputError

LOOK_S: Final = 30.0
VERSIONS_S: Final = 60.0
GPUS_S: Final = 75.0
SHARDS_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts, in the order of the checks; ``seconds`` is how long the examination took."""

    rows: list[Row]
    seconds: float

    @property
    def level(self) -> Level:
        """The worst of all rows; what was skipped counts as ok."""
        return max((row.level for row in self.rows if row.level != "skipped"), key=LEVELS.index, default="ok")


@dataclass(frozen=True, slots=True)
class Check:
    """``measure`` gets facts by place, ``judge`` says what they mean; ``remedy`` is for facts that can't be had."""

    name: str
    measure: Callable[[Hosts, Plan], Measured]
    judge: Callable[[str, dict[str, Facts]], list[Row]]
    remedy: str
    skip: Callable[[Plan], str | None] = lambda plan: None
    """Why there is nothing to check, if so."""


def doctor(config: dict[str, Any], *, say: Callable[[str], None] = lambda text: None) -> Report:
    """Examines the driver and every node of the cluster that ``config`` (of ``onestage.config.compose``) names.

    ``say`` gets a line for each step. Raises InputError where there is no such cluster, or it can't be reached.
    """
    start = time.monotonic()
    plan = planned(config)
    rows: list[Row] = []
    with doctor_hosts.connected(config["cluster"], say) as hosts:
        rows += hosts.summary
        say("waiting for the nodes' answer")
        rows += _keep_who_answers(hosts, plan)
        for check in CHECKS:
            if (reason := check.skip(plan)) is not None:
                rows.append(Row(CLUSTER, check.name, "skipped", reason))
                continue
            say(f"looking at {check.name}")
            rows += examine(check, hosts, plan)
    return Report(rows, time.monotonic() - start)


def planned(config: dict[str, Any]) -> Plan:
    """What the config asks to look at, with absolute paths. Raises InputError for settings that can't be."""
    from onestage.tracking.tracker import store_uri

    data, root, storage = config["data"], config["data"]["root"], config["storage"]
    settings = {key: data[key] for key in ("cache", "cache_gib", "timeout_s", "retries")}
    try:
        StoreSettings(**settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Plan(
        root=root if root is None or is_address(root) else os.path.abspath(root),
        settings=settings,
        storage=storage if is_address(storage) else os.path.abspath(storage),
        tracking_uri=store_uri(config),
        mark=f".onestage-doctor-{uuid.uuid4().hex[:12]}",
    )


def examine(check: Check, hosts: Hosts, plan: Plan) -> list[Row]:
    """One check's rows: a problem for whoever has no facts, the check's verdicts on all others."""
    measured = check.measure(hosts, plan)
    facts = {where: found for where, found in measured.items() if not isinstance(found, Failure)}
    failed = [
        Row(where, check.name, "problem", found.what, found.remedy or check.remedy)
        for where, found in measured.items()
        if isinstance(found, Failure)
    ]
    return check.judge(check.name, facts) + failed if facts else failed


def _keep_who_answers(hosts: Hosts, plan: Plan) -> list[Row]:
    """A problem for each node on which no process of ours answers; it is asked nothing more."""
    silent = {
        name: answer
        for name, answer in hosts.on_nodes(doctor_node.hello, plan, START_S).items()
        if isinstance(answer, Failure)
    }
    addresses = {node.name: node.address for node in hosts.nodes}
    hosts.nodes = [node for node in hosts.nodes if node.name not in silent]
    return [
        Row(
            name,
            "answers",
            "problem",
            f"{addresses[name]}: {answer.what}",
            "see that the host is up and its ports are open; where onestage is not installed there, use "
            "cluster.ship=true",
        )
        for name, answer in silent.items()
    ]


def _everywhere(look: Callable[[Plan], Facts], limit_s: float) -> Callable[[Hosts, Plan], Measured]:
    return lambda hosts, plan: hosts.everywhere(look, plan, limit_s)


CHECKS: Final = (
    Check(
        "versions",
        _everywhere(doctor_node.versions, VERSIONS_S),
        verdicts.judge_versions,
        remedy="install onestage and what it needs there, in the driver's versions",
    ),
    Check(
        "GPUs", _everywhere(doctor_node.gpus, GPUS_S), verdicts.judge_gpus, remedy="see whether nvidia-smi runs there"
    ),
    Check(
        doctor_node.SHM, _everywhere(doctor_node.memory, LOOK_S), verdicts.judge_memory, remedy="mount a tmpfs there"
    ),
    Check(
        "disk",
        _everywhere(doctor_node.disks, LOOK_S),
        verdicts.judge_disks,
        remedy="mend the mount that hangs or fails",
    ),
    Check(
        "open files",
        _everywhere(doctor_node.limits, LOOK_S),
        verdicts.judge_limits,
        remedy="see whether the host is well",
    ),
    Check(
        "access",
        _everywhere(doctor_node.exposure, LOOK_S),
        verdicts.judge_exposure,
        remedy="see whether the host is well",
    ),
    Check("clock", doctor_hosts.round_trips, verdicts.judge_clock, remedy="see whether the host is well"),
    Check(
        "shards",
        _everywhere(doctor_node.shards, SHARDS_S),
        verdicts.judge_shards,
        remedy="copy the dataset to this machine at the same path, mount it, or use an address such as s3://…",
        skip=lambda plan: "data.root is not set" if plan.root is None else None,
    ),
    Check(
        "storage",
        doctor_hosts.through_storage,
        verdicts.judge_storage,
        remedy="mount one folder on all machines, or use s3://…",
    ),
    Check(
        "MLflow",
        doctor_hosts.reach_tracking,
        verdicts.judge_tracking,
        remedy="start `onestage server` where every node reaches it, and set tracking.uri",
        skip=lambda plan: "tracking=none" if plan.tracking_uri is None else None,
    ),
    Check(
        "all-reduce", doctor_hosts.between_pairs, verdicts.judge_pairs, remedy="open all TCP ports between the nodes"
    ),
)
