"""What ``onestage doctor`` looks at on one machine, the driver's or a node's: facts, no verdicts.

A look takes the plan and returns plain data. It raises InputError, or whatever else went wrong, for what it could not
find out.
"""

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from onestage import __version__
from onestage.errors import InputError

Facts = dict[str, Any]

SHM: Final = "/dev/shm"
RAYS_FOLDER: Final = "Ray's temporary folder"
GPU_FIELDS: Final = ("name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
COMMAND_S: Final = 15.0
GPU_START_S: Final = 45.0
HTTP_S: Final = 5.0
STORE_S: Final = 15.0
SIZES_BYTES: Final = (2**20, 8 * 2**20, 64 * 2**20)
REPEATS: Final = 3
LONGEST_S: Final = 1.0
"""No larger size is tried where it would take one all-reduce longer: a slow link shows with a small one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is looked at, the same on every machine."""

    root: str | None
    """``data.root``, absolute."""
    settings: dict[str, Any]
    """Those of ``StoreSettings``."""
    storage: str
    """Absolute, or an address."""
    tracking_uri: str | None
    mark: str
    """The name of this examination's folder in the storage."""

    @property
    def shown_storage(self) -> str:
        """As messages show it."""
        from onestage.data.store import redacted

        return f"storage={redacted(self.storage)}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A look that came to nothing: what happened, and what to do where that is known."""

    what: str
    remedy: str = ""


def attempt(look: Callable[..., Facts], *arguments: Any) -> Facts | Failure:
    """``look(*arguments)``, or why it failed: as plain data, which travels where an exception might not."""
    try:
        return look(*arguments)
    except InputError as error:
        what, _, remedy = str(error).rpartition(": ")
        return Failure(what, remedy) if what else Failure(remedy)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Failure(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


class Inspector:
    """A process of ours on a node, as an actor; its calls run in threads, so that one that hangs holds up no other."""

    def __init__(self) -> None:
        self._stores: dict[int, Any] = {}

    def look(self, look: Callable[..., Facts], plan: Plan) -> Facts | Failure:
        """What ``look`` finds here."""
        return attempt(look, plan)

    def now(self) -> Facts:
        """This machine's clock, in seconds since 1970."""
        return {"now": time.time()}

    def listen(self, limit_s: float) -> Facts | Failure:
        """Opens a store where a pair of processes meets: its port, and this node's address and interface."""
        return attempt(self._listen, limit_s)

    def all_reduce(self, rank: int, host: str, port: int, backend: str, limit_s: float) -> Facts | Failure:
        """One side of a pair; rank 0 is who listens at ``port``."""
        return attempt(self._all_reduce, rank, host, port, backend, limit_s)

    def _listen(self, limit_s: float) -> Facts:
        import ray
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it re-exports it unsaid

        host = ray.util.get_node_ip_address()
        limit = timedelta(seconds=limit_s)
        store = TCPStore(host, 0, world_size=2, is_master=True, timeout=limit, wait_for_workers=False)
        self._stores[store.port] = store
        return {"host": host, "port": store.port, "interface": interface_of(host)}

    def _all_reduce(self, rank: int, host: str, port: int, backend: str, limit_s: float) -> Facts:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it re-exports it unsaid

        if rank == 0:
            store = self._stores.pop(port)
        else:
            with contextlib.suppress(OSError):  # the store's own wait says less
                socket.create_connection((host, port), timeout=limit_s / 2).close()
            store = TCPStore(host, port, world_size=2, timeout=timedelta(seconds=limit_s / 2), wait_for_workers=False)
        return all_reduce(store, rank=rank, backend=backend, limit_s=limit_s)


def all_reduce(store: Any, *, rank: int, backend: str, limit_s: float) -> Facts:
    """The best all-reduce of two processes, over several sizes: ``bytes``, ``seconds``, ``mb_per_s``.

    ``mb_per_s`` is the algorithm bandwidth, bytes / seconds, in units of 10^6 bytes a second. The bus bandwidth, with
    2 (n - 1) / n of it over n processes, is the same for n = 2: what the link carries each way. (NCCL tests,
    doc/PERFORMANCE.md.) ``store`` is where the two meet. Raises RuntimeError where they don't within ``limit_s``, or
    where a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = "cuda" if backend == "nccl" else "cpu"
    group = _group(backend, store, rank=rank, limit_s=limit_s)
    slowest = dist.AllreduceOptions()
    slowest.reduceOp = dist.ReduceOp.MAX
    best = {"bytes": 0, "seconds": 0.0, "mb_per_s": 0.0}
    try:
        for num_bytes in SIZES_BYTES:
            if best["bytes"] and best["seconds"] * num_bytes / best["bytes"] > LONGEST_S:
                break
            tensor = torch.ones(num_bytes // 4, device=device)
            seconds = []
            for _ in range(1 + REPEATS):  # the first opens connections
                start = time.perf_counter()
                group.allreduce([tensor]).wait()
                total = tensor[0].item()  # waits for a GPU
                seconds.append(time.perf_counter() - start)
            if total != 2.0 ** (1 + REPEATS) or not bool((tensor == total).all()):
                raise RuntimeError("the all-reduce summed wrongly")
            slower = torch.tensor(min(seconds[1:]), dtype=torch.float64, device=device)
            group.allreduce([slower], slowest).wait()  # both sides must agree on whether to go on
            found = {"bytes": num_bytes, "seconds": slower.item(), "mb_per_s": num_bytes / slower.item() / 1e6}
            best = max(best, found, key=lambda one: one["mb_per_s"])
    finally:
        group.shutdown()
    return {**best, "backend": backend}


def _group(backend: str, store: Any, *, rank: int, limit_s: float) -> Any:
    """Two processes as a group: not the default one, which would be a pair's until the last of its waits ended."""
    import torch.distributed as dist

    limit = timedelta(seconds=limit_s)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def hello(plan: Plan) -> Facts:
    """That this machine answers."""
    return {"pid": os.getpid(), "hostname": socket.gethostname()}


def versions(plan: Plan) -> Facts:
    """What is installed here; ``source`` is a digest of the package's own code."""
    import torch

    return {
        "python": platform.python_version(),
        "onestage": __version__,
        "source": _source_digest(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _installed(name) for name in ("ray", "pytorch-lightning", "torchvision", "mlflow")},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def gpus(plan: Plan) -> Facts:
    """The GPUs that nvidia-smi knows, and whether torch can use them; sizes in MiB."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": [], "driver": None, "torch": None, "unseen": Path("/proc/driver/nvidia").exists()}
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"nvidia-smi: {said[0]}: mend the NVIDIA driver of this host")
    found = parse_gpus(done.stdout)
    return {
        "gpus": found,
        "driver": found[0]["driver_version"] if found else None,
        "torch": _torch_on_gpu() if found else None,
        "unseen": False,
    }


def parse_gpus(listing: str) -> list[Facts]:
    """The rows of nvidia-smi's csv, in the order of ``GPU_FIELDS``.

    >>> parse_gpus("NVIDIA H100, 550.54.15, 81559, 4, [N/A]")[0]["memory.total"]
    '81559'
    """
    rows = (line.split(", ") for line in listing.splitlines() if line.strip())
    return [dict(zip(GPU_FIELDS, (value.strip() for value in row), strict=False)) for row in rows]


def memory(plan: Plan) -> Facts:
    """/dev/shm, where loader workers hand over batches and Ray keeps objects: size and free bytes."""
    if not os.path.isdir(SHM):
        raise InputError(f"no {SHM} on this host: mount a tmpfs there, Ray and loader workers need it")
    usage = shutil.disk_usage(SHM)
    return {"size": usage.total, "free": usage.free}


def disks(plan: Plan) -> Facts:
    """Size and free bytes of the disks that a training writes to: what it is for -> {path, size, free}."""
    from onestage.data import cache
    from onestage.data.store import is_address

    places: dict[str, str] = {}
    if (temporary := _ray_folder()) is not None:
        places[RAYS_FOLDER] = temporary
    if not is_address(plan.storage):
        places["storage"] = plan.storage
    if plan.root is not None and is_address(plan.root):
        places["data cache"] = str(cache.folder(plan.settings["cache"]))
    found = {}
    for purpose, path in places.items():
        usage = shutil.disk_usage(_existing(path))
        if usage.total:  # /proc and the like have no size
            found[purpose] = {"path": path, "size": usage.total, "free": usage.free}
    return found


def limits(plan: Plan) -> Facts:
    """How many files a process may hold open."""
    return {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}


def exposure(plan: Plan) -> Facts:
    """Who could reach Ray here: the token file's mode, whether tokens are asked for, and this host's public addresses.

    Ray's GCS, raylet and agents listen on all interfaces, whatever address the node was given.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    named = "RAY_AUTH_TOKEN_PATH" in os.environ or "RAY_AUTH_TOKEN" not in os.environ  # a token in hand needs no file
    mode = None
    with contextlib.suppress(OSError):
        mode = file.stat().st_mode & 0o777 if named else None
    return {
        "token_file": str(file),
        "token_mode": mode,
        "asks_token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        "public": sorted(address for address, _ in _addresses() if ip_address(address).is_global),
    }


def shards(plan: Plan) -> Facts:
    """The dataset as it is seen from here: its content hash, and one sample read from its smallest shard.

    Of a folder every shard is looked at for its size. Raises InputError or Unreadable for what can't be read.
    """
    from onestage.data.manifest import Manifest
    from onestage.data.shards import ShardReader
    from onestage.data.store import LocalStore, StoreSettings, open_store

    assert plan.root is not None
    wait_s = min(plan.settings["timeout_s"], STORE_S)
    settings = StoreSettings(**{**plan.settings, "timeout_s": wait_s, "retries": 0})
    store = open_store(plan.root, settings=settings)
    manifest = Manifest.load(plan.root, settings=settings)
    all_shards = [shard for split in manifest.splits.values() for shard in split.shards]
    if isinstance(store, LocalStore):
        wrong = [one.name for one in all_shards if _size(store.root / one.name) != one.num_bytes]
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(all_shards)} shards of {store.shown()} are missing or cut short, "
                f"such as {wrong[0]}: copy the dataset again"
            )
    smallest = min((one for one in all_shards if one.num_samples), key=lambda one: one.num_bytes, default=None)
    start = time.perf_counter()
    if smallest is not None:
        split = next(name for name, split in manifest.splits.items() if smallest in split.shards)
        ShardReader(plan.root, split, manifest=manifest, store=store).read(smallest.keys()[0])
    return {
        "content_hash": manifest.content_hash,
        "num_shards": len(all_shards),
        "num_images": sum(shard.num_samples for shard in all_shards),
        "seconds": time.perf_counter() - start,
    }


def open_storage(plan: Plan) -> Facts:
    """The driver's part: makes the folder of this examination in the storage, with a word for the nodes to find."""
    with _storage(plan) as (files, folder):
        if _is_local(files):
            made = not files.exists(plan.storage)
            files.makedirs(folder, exist_ok=True)
        else:
            made = False
        start = time.perf_counter()
        files.pipe_file(f"{folder}/driver", plan.mark.encode())
        if files.cat_file(f"{folder}/driver") != plan.mark.encode():
            raise _other_bytes(plan)
        return {"made": made, "seconds": time.perf_counter() - start}


def touch_storage(plan: Plan) -> Facts:
    """A node's part: whether the driver's word is here, and a word of its own, under a new name."""
    with _storage(plan) as (files, folder):
        files.invalidate_cache()
        if not files.exists(f"{folder}/driver"):
            raise InputError(
                f"{plan.shown_storage} is not the driver's here: give a folder that all machines mount at that path, "
                f"or an address such as s3://BUCKET/runs"
            )
        start = time.perf_counter()
        name = uuid.uuid4().hex
        files.pipe_file(f"{folder}/{name}", name.encode())
        if files.cat_file(f"{folder}/{name}") != name.encode():
            raise _other_bytes(plan)
        return {"name": name, "seconds": time.perf_counter() - start}


def seen_in_storage(plan: Plan) -> Facts:
    """The driver's view of what the nodes wrote: ``names``."""
    with _storage(plan) as (files, folder):
        files.invalidate_cache()
        return {"names": [os.path.basename(name) for name in files.ls(folder, detail=False)]}


def clear_storage(plan: Plan) -> Facts:
    """Deletes what this examination wrote."""
    with _storage(plan) as (files, folder):
        if files.exists(folder):
            files.rm(folder, recursive=True)
        return {}


def drop_storage(plan: Plan) -> Facts:
    """Deletes the storage's folder, which this examination made, if nobody has put anything there."""
    with contextlib.suppress(OSError):
        os.rmdir(plan.storage)
    return {}


def tracking_server(plan: Plan) -> Facts:
    """The MLflow server's version and this machine's own, and the seconds an answer takes; asked without MLflow."""
    from onestage.tracking.redaction import redact, without_user

    assert plan.tracking_uri is not None
    base, shown = without_user(plan.tracking_uri).rstrip("/"), redact(plan.tracking_uri)
    start = time.perf_counter()
    try:
        version = _get(f"{base}/version")
        seconds = time.perf_counter() - start
        with contextlib.suppress(json.JSONDecodeError):
            version = str(json.loads(version))
        try:
            _get(f"{base}/api/3.0/mlflow/server-info")  # open to all, but not under each name of the server
        except HTTPError as error:
            if error.code == 403:
                raise InputError(
                    f"the MLflow server at {shown} refuses this name of its (403): start it with "
                    f"--allowed-hosts HOST:PORT, as in tracking.uri"
                ) from None
    except HTTPError as error:
        raise InputError(
            f"{shown} answers {error.code} where MLflow would say its version: is tracking.uri right?"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise InputError(
            f"no MLflow server answers at {shown} ({reason}): start one that this host reaches "
            f"(`onestage server --host ADDRESS --allowed-hosts …`), or mend tracking.uri"
        ) from None
    return {"version": version.strip()[:40], "client": _installed("mlflow"), "seconds": seconds}


def tracking_store(plan: Plan) -> Facts:
    """That MLflow can use a store which is no server: only the driver asks. A SQLite file is not made for that."""
    from onestage.tracking.client import SQLITE, check

    assert plan.tracking_uri is not None
    start = time.perf_counter()
    file = Path(plan.tracking_uri.removeprefix(SQLITE))
    if plan.tracking_uri.startswith(SQLITE) and not file.exists():
        if not os.access(_existing(str(file.parent)), os.W_OK | os.X_OK):
            raise InputError(f"{file} can't be made: mend the permissions of its folder, or set tracking.uri")
        return {"seconds": time.perf_counter() - start}
    check(plan.tracking_uri)
    return {"seconds": time.perf_counter() - start}


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address."""
    return next((name for found, name in _addresses() if found == address), None)


def _addresses() -> Iterator[tuple[str, str]]:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                yield one.address.partition("%")[0], name


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Two installations may have one version and different code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _torch_on_gpu() -> str | None:
    """Why torch can't use a GPU of this host, None where it can; in a process of its own, which has all in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = "import torch; torch.zeros(1, device='cuda').item()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=GPU_START_S, env=environment, check=False
    )
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None


def _ray_folder() -> str | None:
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_temp_dir()) if ray is not None and ray.is_initialized() else None


def _existing(path: str) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(one for one in (Path(path), *Path(path).parents) if one.exists())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


@contextlib.contextmanager
def _storage(plan: Plan) -> Iterator[tuple[Any, str]]:
    """The storage's file system, and the folder of this examination in it."""
    from fsspec.core import url_to_fs

    from onestage.data.store import redacted

    try:
        files, path = url_to_fs(plan.storage)
        yield files, f"{path.rstrip('/')}/{plan.mark}"
    except InputError:
        raise
    except Exception as error:  # each file system has its own
        reason = redacted(str(getattr(error, "strerror", None) or error).strip() or type(error).__name__)
        raise InputError(
            f"{plan.shown_storage} can't be written ({reason.splitlines()[0]}): mend its mount or its "
            f"permissions, or set storage=… to a place that every machine can write"
        ) from error


def _other_bytes(plan: Plan) -> InputError:
    return InputError(f"{plan.shown_storage} gave back other bytes than were written: choose another one")


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def _get(address: str) -> str:
    with urlopen(address, timeout=HTTP_S) as answer:
        body: bytes = answer.read(10_000)
        return body.decode(errors="replace")
