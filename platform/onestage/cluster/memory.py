"""Whether a lost worker's host had run out of memory: Ray's memory monitor, the kernel or the allocator says so."""

from pathlib import Path
from typing import Final

from onestage.cluster.connection import on_node

ANSWER_S: Final = 20.0
REMEDY: Final = (
    "lower data.num_workers or data.batch_size, put fewer workers on a host (cluster.cpus_per_worker), or give it more "
    "memory"
)
NAMES: Final = ("MemoryError", "OutOfMemoryError")
ALLOCATOR: Final = "DefaultCPUAllocator: can't allocate memory"
MONITOR: Final = "killed due to the node running low on memory"


def oom_kills() -> int:
    """Processes that this machine's kernel has ended for want of memory, since it was started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def oom_kills_on(node: str) -> int | None:
    """The same on another node of the cluster, by its id; None where it does not answer."""
    import ray

    ask = ray.remote(max_retries=0, **on_node(node))(oom_kills)
    try:
        return int(ray.get(ask.remote(), timeout=ANSWER_S))
    except Exception:  # the node may be lost altogether
        return None


def ran_out(failure: BaseException) -> str | None:
    """Who found the memory too small, going by a worker's failure; None where it does not say so."""
    from ray.exceptions import OutOfMemoryError

    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(getattr(cause, "health_check_failure", cause), OutOfMemoryError) or MONITOR in str(cause):
            return "Ray's memory monitor ended"
        # What a training raises comes by its name, as text of a traceback.
        if type(cause).__name__ in NAMES or ALLOCATOR in str(cause):
            return "an allocation failed in"
        cause = cause.__cause__
    return None
