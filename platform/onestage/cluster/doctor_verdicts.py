"""What the facts of ``onestage doctor`` mean. A judge gets the facts of those who answered, by place."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from statistics import median
from typing import Any, Final, Literal

from onestage.cluster import resources
from onestage.cluster.doctor_node import RAYS_FOLDER, Facts

DRIVER: Final = "driver"
CLUSTER: Final = "cluster"

SKEW_WARNING_S: Final = 1.0
SKEW_PROBLEM_S: Final = 60.0
SHM_WARNING_BYTES: Final = 2 * 2**30
SHM_PROBLEM_BYTES: Final = 256 * 2**20
DISK_WARNING_BYTES: Final = 10 * 2**30
DISK_PROBLEM_BYTES: Final = 2**30
RAY_FULL: Final = 0.95
"""Ray stops writing objects to a disk that is fuller."""
OPEN_FILES: Final = 4096
SLOW_MB_PER_S: Final = 100.0
"""A link of 1 Gbit/s carries a little more; the 248 MB of YOLOv3's gradients take 2.5 s a step at this."""
OUTLIER: Final = 1 / 3
NO_ERRORS: Final = ("0", "[N/A]", "N/A", "[Not Supported]")

Level = Literal["ok", "skipped", "warning", "problem"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "skipped", "warning", "problem")

_SHIP: Final = "use cluster.ship=true, or install the driver's onestage on every node"
MUST_AGREE: Final[dict[str, tuple[Level, str]]] = {
    "python": ("problem", "install one minor version of Python everywhere: Ray refuses others"),
    "ray": ("problem", "install one version of Ray everywhere"),
    "onestage": ("problem", _SHIP),
    "source": ("problem", _SHIP),
    "torch": ("problem", "install one version of torch everywhere"),
    "pytorch-lightning": ("problem", "install one version of pytorch-lightning everywhere"),
    "torchvision": ("warning", "install one version of torchvision everywhere"),
    "mlflow": ("warning", "install one version of mlflow everywhere"),
    "cuda": ("problem", "install one CUDA build of torch on all nodes"),
    "platform": ("warning", "use nodes of one kind: others round differently, and one wheel does not fit all"),
}
OF_NODES: Final = ("cuda", "platform")
"""What the driver, which trains nothing, may have of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One verdict: where (a node, the driver, a pair or the cluster), on what, the figure, and what to do about it."""

    where: str
    check: str
    level: Level
    figure: str
    remedy: str = ""


def capacity(nodes: list[resources.Node], *, dead: Sequence[str], cluster: Mapping[str, Any]) -> list[Row]:
    """Whether the workers asked for fit, now or ever; and who is gone."""
    worker = {"CPU": float(cluster["cpus_per_worker"] or 1)}
    if cluster["gpus_per_worker"]:
        worker["GPU"] = float(cluster["gpus_per_worker"])
    wanted, least = cluster["num_workers"], cluster["min_workers"] or cluster["num_workers"]
    fitting = resources.num_fitting(nodes, worker)
    rows = []
    if fitting >= least:
        size = " and ".join(f"{amount:g} {name}" for name, amount in worker.items())
        told = f"nodes: {len(nodes)}; workers of {size}: {fitting} fit, {wanted} asked"
        rows.append(Row(CLUSTER, "room", "ok", told))
    else:
        ever = resources.num_fitting(nodes, worker, empty=True) >= least
        figure = resources.shortage(nodes, wanted=wanted, least=least, worker=worker, fitting=fitting)
        remedy = (
            "wait for what runs there, or stop it"
            if ever
            else "add nodes, or lower cluster.num_workers or cluster.cpus_per_worker"
        )
        rows.append(Row(CLUSTER, "room", "warning" if ever else "problem", figure.partition(", and even")[0], remedy))
    if dead:
        names = ", ".join(sorted(set(dead)))
        rows.append(Row(CLUSTER, "lost nodes", "warning", names, "start Ray there again, if it is to take part"))
    return rows


def dashboard(address: str, *, asks_token: bool) -> list[Row]:
    """Where Ray's dashboard, which takes jobs, answers: HOST:PORT, or empty where there is none."""
    if not address:
        return []
    host = address.rpartition(":")[0].strip("[]")
    try:
        inside, public = ip_address(host).is_loopback, ip_address(host).is_global
    except ValueError:
        inside, public = host == "localhost", False
    if inside or (asks_token and not public):
        return [Row(CLUSTER, "dashboard", "ok", f"{address}{', with the token' if asks_token else ''}")]
    figure = f"{address}, on all of that host's interfaces{'' if asks_token else ', and it asks for no token'}"
    remedy = "start the head with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1, and come by ssh -L 8265:…"
    return [Row(CLUSTER, "dashboard", "warning", figure, remedy)]


def judge_versions(check: str, facts: dict[str, Facts]) -> list[Row]:
    """Who differs from most nodes; the driver's build of CUDA is its own affair."""
    nodes = {where: one for where, one in facts.items() if where != DRIVER} or facts
    usual = {key: _most_common(one[key] for one in nodes.values()) for key in next(iter(facts.values()))}
    usual["python"] = _minor(usual["python"])
    rows = []
    for where, one in facts.items():
        figure = ", ".join(f"{key} {one[key]}" for key in ("python", "onestage", "ray", "torch") if one[key])
        level: Level = "ok"
        different, remedies = [], []
        for key, (severity, remedy) in MUST_AGREE.items():
            value = _minor(one[key]) if key == "python" else one[key]
            if value is None and key != "cuda":
                different.append(f"no {key}")
            elif value != usual[key] and not (where == DRIVER and key in OF_NODES):
                different.append(f"{key} {one[key]}, most nodes have {usual[key]}")
            else:
                continue
            level = max(level, severity, key=LEVELS.index)
            remedies.append(remedy)
        remedy = "; ".join(dict.fromkeys(remedies))
        rows.append(Row(where, check, level, "; ".join(different) if different else figure, remedy))
    return rows


def judge_gpus(check: str, facts: dict[str, Facts]) -> list[Row]:
    drivers = {one["driver"] for one in facts.values() if one["driver"]}
    return [_gpus_of(where, check, one, drivers) for where, one in facts.items()]


def _gpus_of(where: str, check: str, one: Facts, drivers: set[str]) -> Row:
    found = one["gpus"]
    if one["unseen"]:
        return Row(where, check, "warning", "an NVIDIA driver, but no nvidia-smi", "install nvidia-smi, or share it in")
    if not found:
        return Row(where, check, "ok", "no GPUs: trains on CPUs, with gloo")
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu["name"] for gpu in found).items())
    figure = f"{names}, driver {one['driver']}"
    if one["torch"] is not None:
        remedy = "upgrade the NVIDIA driver, or install the torch build for its CUDA version"
        return Row(where, check, "problem", f"{names}, but torch can't use them: {one['torch']}", remedy)
    damaged = [gpu for gpu in found if gpu["ecc.errors.uncorrected.volatile.total"] not in NO_ERRORS]
    if damaged:
        remedy = "reset or replace the card: its memory gives wrong numbers"
        return Row(where, check, "problem", f"{figure}; {len(damaged)} with uncorrected memory errors", remedy)
    if len(drivers) > 1:
        others = ", ".join(sorted(drivers - {one["driver"]}))
        return Row(where, check, "warning", f"{figure}; elsewhere {others}", "install one driver version on all hosts")
    return Row(where, check, "ok", figure)


def judge_memory(check: str, facts: dict[str, Facts]) -> list[Row]:
    """Ray puts its objects on the disk, and a loader worker is killed (SIGBUS), where /dev/shm is small or full."""
    rows = []
    for where, one in facts.items():
        figure = f"{_gib(one['free'])} free of {_gib(one['size'])}"
        remedy = "containers: --shm-size=8g; else: mount -o remount,size=8G /dev/shm"
        if one["size"] >= SHM_WARNING_BYTES > one["free"]:
            remedy = "delete what ended programs left in /dev/shm"
        rows.append(Row(where, check, *_below(one["free"], SHM_WARNING_BYTES, SHM_PROBLEM_BYTES, figure, remedy)))
    return rows


def judge_disks(check: str, facts: dict[str, Facts]) -> list[Row]:
    rows = []
    for where, places in facts.items():
        for purpose, one in places.items():
            figure = f"{_gib(one['free'])} free of {_gib(one['size'])} for {purpose} ({one['path']})"
            verdict = _below(one["free"], DISK_WARNING_BYTES, DISK_PROBLEM_BYTES, figure, f"make room for {purpose}")
            if purpose == RAYS_FOLDER and one["free"] < (1 - RAY_FULL) * one["size"]:
                remedy = "make room, or give Ray another --temp-dir: it writes no objects to a disk this full"
                verdict = ("problem", figure, remedy)
            rows.append(Row(where, check, *verdict))
    return rows


def judge_limits(check: str, facts: dict[str, Facts]) -> list[Row]:
    remedy = "ulimit -n 65536 before Ray is started there"
    return [
        Row(where, check, "warning", f"{one['open_files']:,}", remedy)
        if 0 <= one["open_files"] < OPEN_FILES
        else Row(where, check, "ok", f"{one['open_files']:,}" if one["open_files"] >= 0 else "no limit")
        for where, one in facts.items()
    ]


def judge_exposure(check: str, facts: dict[str, Facts]) -> list[Row]:
    rows = []
    for where, one in facts.items():
        findings = []
        if one["token_mode"] is not None and one["token_mode"] & 0o077:
            mode = f"{one['token_file']} has mode {one['token_mode']:04o}"
            findings.append((mode, f"chmod 600 {one['token_file']}"))
        if where != DRIVER and not one["asks_token"]:
            remedy = "start Ray with RAY_AUTH_MODE=token: who reaches its ports runs what he likes"
            findings.append(("asks for no token", remedy))
        if where != DRIVER and one["public"]:
            addresses = ", ".join(one["public"])
            findings.append((f"public at {addresses}", "close Ray's ports there in the firewall: it listens on all"))
        for figure, remedy in findings:
            rows.append(Row(where, check, "warning", figure, remedy))
        if not findings:
            rows.append(Row(where, check, "ok", "with a token" if one["asks_token"] else "no token lies open"))
    return rows


def judge_shards(check: str, facts: dict[str, Facts]) -> list[Row]:
    usual = facts.get(DRIVER, next(iter(facts.values())))["content_hash"]
    rows = []
    for where, one in facts.items():
        figure = f"{one['num_images']:,} images in {one['num_shards']} shards, one read in {one['seconds']:.2f} s"
        if one["content_hash"] == usual:
            rows.append(Row(where, check, "ok", figure))
        else:
            remedy = "copy the dataset again, or use one address for all"
            rows.append(Row(where, check, "problem", f"another dataset than the driver's: {figure}", remedy))
    return rows


def judge_storage(check: str, facts: dict[str, Facts]) -> list[Row]:
    return [
        Row(where, check, "ok", f"written and read back in {one['seconds']:.2f} s, deleted")
        for where, one in facts.items()
    ]


def judge_tracking(check: str, facts: dict[str, Facts]) -> list[Row]:
    rows = []
    for where, one in facts.items():
        if "version" not in one:
            rows.append(_judge_store(where, check, one))
        elif one["client"] is not None and _minor(one["version"]) != _minor(one["client"]):
            figure = f"MLflow {one['version']} answers, the client here is {one['client']}"
            rows.append(Row(where, check, "warning", figure, "install one version of MLflow on server and hosts"))
        else:
            rows.append(Row(where, check, "ok", f"MLflow {one['version']} answers in {one['seconds'] * 1e3:.0f} ms"))
    return rows


def _judge_store(where: str, check: str, one: Facts) -> Row:
    if not one["elsewhere"]:
        return Row(where, check, "ok", f"usable ({one['seconds']:.1f} s); only the driver's machine asks it")
    return Row(
        where,
        check,
        "warning",
        "a file of this machine: rank 0 of a training logs from its own node, and would not find it there",
        "run `onestage server --host ADDRESS --allowed-hosts ADDRESS:5000`, and set tracking.uri=http://ADDRESS:5000",
    )


def judge_clock(check: str, facts: dict[str, Facts]) -> list[Row]:
    rows = []
    for where, one in facts.items():
        offset, within_s = one["offset_s"], one["within_s"]
        figure = f"{offset:+.3f} s to the driver's, within {within_s * 1e3:.1f} ms"
        least = max(abs(offset) - within_s, 0.0)  # what it is off in any case
        level: Level = "problem" if least > SKEW_PROBLEM_S else "warning" if least > SKEW_WARNING_S else "ok"
        rows.append(Row(where, check, level, figure, "" if level == "ok" else "run chrony or ntpd on this host"))
    return rows


def judge_pairs(check: str, facts: dict[str, Facts]) -> list[Row]:
    """A link is slow by itself, or beside the others."""
    speeds = {pair: one["mb_per_s"] for pair, one in facts.items() if "mb_per_s" in one}
    usual = median(speeds.values()) if speeds else 0.0
    rows = []
    for pair, speed in speeds.items():
        one = facts[pair]
        figure = f"{speed:,.0f} MB/s with {one['backend']} ({one['bytes'] / 2**20:.0f} MiB in {one['seconds']:.3f} s)"
        if one["gpus_at_work"]:
            figure += "; its GPUs are at work, so this is the CPUs' way"
        if speed < SLOW_MB_PER_S:
            remedy = (
                "a faster network, or one process per host: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME name the fast one"
            )
            rows.append(Row(pair, check, "warning", f"slow: {figure}", remedy))
        elif speed < OUTLIER * usual:
            remedy = "look at this link's cable, switch port and MTU; the slowest link sets every step's pace"
            rows.append(Row(pair, check, "warning", f"{figure}, where half of the pairs reach {usual:,.0f}", remedy))
        else:
            rows.append(Row(pair, check, "ok", figure))
    if (rest := facts.get(CLUSTER)) is not None:
        total = rest["left_out"] + rest["measured"]
        rows.append(Row(CLUSTER, check, "skipped", f"{rest['measured']} of {total} pairs measured, drawn at random"))
    return rows


def _below(amount: int, warning: int, problem: int, figure: str, remedy: str) -> tuple[Level, str, str]:
    level: Level = "problem" if amount < problem else "warning" if amount < warning else "ok"
    return level, figure, "" if level == "ok" else remedy


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _minor(version: str | None) -> str | None:
    """
    >>> _minor("3.11.9")
    '3.11'
    """
    return None if version is None else ".".join(version.split(".")[:2])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
