"""A training as Ray Train workers, on this machine or on a cluster, started again after a loss."""

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from onestage.cluster import connection, memory, resources
from onestage.cluster.board import Place
from onestage.cluster.job import Job
from onestage.cluster.restarts import Restarts
from onestage.cluster.stop import Stop
from onestage.cluster.storage import RunFolder, check_storage, marked, same_place
from onestage.cluster.watchdog import watchdog_of
from onestage.data.store import redacted
from onestage.errors import InputError

POLL_S: Final = 0.3
GRACE_S: Final = 120.0
"""So long the workers may take to save a checkpoint when they are asked to stop."""
GROW_EVERY_S: Final = 15.0
COLLECTIVE_S: Final = 600.0
BOARD_S: Final = 60.0
RAY_STORAGE: Final = "ray/train/v2/_internal/execution/storage.py"
"""In the traceback of a group whose machines can't reach the storage."""

Show = Callable[[dict[str, Any]], None]


class GaveUp(Exception):
    """The workers were lost once more than ``cluster.max_failures`` allows, or fail each time in the same way."""


class Lost(Exception):
    """The worker group ended without a result; the message says why, as far as Ray knows.

    ``raised``: by an error of the training itself, not by the loss of the workers ``ranks`` or their machines; it is
    known again by its ``kind``.
    """

    def __init__(self, why: str, *, raised: bool, ranks: Sequence[int] = (), kind: str | None = None) -> None:
        super().__init__(why)
        self.raised = raised
        self.ranks = list(ranks)
        self.kind = kind or re.sub(r"worker \d+", "a worker", why)


def on_this_machine(job: Job, *, cores: int, gpus: int, show: Show, stop: Stop) -> dict[str, Any]:
    """Starts Ray on this machine, trains on ``cluster.num_workers`` workers, and ends what it started.

    ``show`` gets the training's progress. Raises what ended the training.
    """
    _limit_start(job)
    with connection.local(cores=cores, gpus=gpus):
        return _train(job, show=show, stop=stop)


def on_cluster(job: Job, *, show: Show, stop: Stop) -> dict[str, Any]:
    """The same, attached to the cluster at ``cluster.address``."""
    cluster = job["config"]["cluster"]
    _limit_start(job)
    # Its parent has asked whether there is a head.
    with connection.attached(
        cluster, wait_s=cluster["wait"] * 60, say=lambda text: show({"waiting": text}), checked=True
    ):
        share_gpus(cluster)
        return _train(job, show=show, stop=stop)


def share_gpus(cluster: dict[str, Any]) -> None:
    """One for each worker, where nobody has said how many and the cluster of this process has so many."""
    if cluster["gpus_per_worker"] is None:
        gpus = sum(node.total.get("GPU", 0.0) for node in connection.nodes())
        cluster["gpus_per_worker"] = 1.0 if gpus >= cluster["num_workers"] else 0.0


def _limit_start(job: Job) -> None:
    seconds = job["config"]["cluster"]["start_timeout_s"]
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{seconds:g}")


def on_this_cluster(job: Job, *, show: Show, stop: Stop) -> dict[str, Any]:
    """The same in a process that Ray itself has started, on the cluster that it belongs to."""
    connection.quiet()
    _limit_start(job)
    return _train(job, show=show, stop=stop)


def _train(job: Job, *, show: Show, stop: Stop) -> dict[str, Any]:
    """Worker groups one after another, until one brings a result, or one that was asked to has stopped."""
    cluster = job["config"]["cluster"]
    restarts = Restarts(limit=cluster["max_failures"], backoff_s=cluster["backoff_s"])
    before: tuple[str, int] | None = None
    while True:
        workers = resources.wait_for_workers(
            cluster, nodes=connection.nodes, say=lambda text: show({"waiting": text}), sleep=stop.sleep
        )
        group = Group(job, num_workers=workers, show=show, stop=stop)
        try:
            result = group.run()
        except Lost as error:
            pause_s = restarts.pause(reached=group.step)
            if pause_s is None:
                raise GaveUp(f"{error} (after {restarts.count} restarts without progress)") from error
            if error.raised and before is not None and before[0] == error.kind and group.step <= before[1]:
                raise GaveUp(f"{error} (twice at the same step)") from error
            before = (error.kind, group.step)
            show(
                {
                    "lost": str(error),
                    "pause_s": pause_s,
                    "restart": restarts.count,
                    "limit": restarts.limit,
                    "ranks": error.ranks,
                }
            )
            stop.sleep(pause_s)
            continue
        if result is not None:
            return result
        if stop.asked is not None:
            stop.raise_asked()
        show({"note": "the cluster has room for more workers: going on with them"})


class Group:
    """One group of workers, from its start to its end; ``step`` is the last that it was heard to be at."""

    def __init__(self, job: Job, *, num_workers: int, show: Show, stop: Stop) -> None:
        self.job = job
        self.cluster = job["config"]["cluster"]
        self.folder = RunFolder(job["config"]["storage"], job["run_id"])
        self.num_workers = num_workers
        self.show = show
        self.stop = stop
        self.step = 0
        self._trains = False  # a worker was heard to have started
        self._places: dict[int, Place] = {}
        self._leaving: dict[int, str] = {}  # why, by rank
        self._stopping_since: float | None = None
        self._looked_for_room = time.monotonic()

    def run(self) -> dict[str, Any] | None:
        """The training's result; None where the workers stopped because they were asked to, with a checkpoint.

        Raises Lost, also where the workers stopped with a checkpoint because one of them has to go, or what no restart
        would mend: InputError, Diverged.
        """
        import ray
        from ray.exceptions import OutOfMemoryError

        from onestage.cluster.board import start_board, this_host

        board = start_board()
        watchdog = watchdog_of(
            board,
            hang_s=self.cluster["hang"] * 60,
            num_workers=self.num_workers,
            folder=self.folder.local,
        )
        storage = self.job["config"]["storage"]
        try:
            with marked(storage) as token, self.stop.listened():
                fit = _Fit(self._trainer(board, token))
                fit.start()
                while fit.is_alive():
                    fit.join(POLL_S)
                    self._look(board)
                    if (verdict := watchdog.look()) is not None:
                        self.show({"hang": verdict})
            self._hear(board)
            outcome: dict[str, Any] | None = ray.get(board.result.remote(), timeout=BOARD_S)
        except OutOfMemoryError as error:
            told = "Ray's memory monitor ended the driver's own helper"
            raise _lost_memory(told, host=this_host()) from error
        finally:
            ray.kill(board)
            shutil.rmtree(self.folder.local / "ray", ignore_errors=True)
        return self._ended(outcome, fit.error, watchdog.verdict)

    def _hear(self, board: Any) -> None:
        import ray

        for message in ray.get(board.take.remote(), timeout=BOARD_S):
            if "refused" in message:  # it would be refused again: not waiting for Ray to end the others
                raise InputError(message["refused"])
            self._trains = self._trains or "started" in message
            self.step = max(self.step, message.get("step", 0))
            if "placed" in message:
                self._places[message["placed"]["rank"]] = message["placed"]
            if "leaving" in message:
                self._leaving[message["leaving"]["rank"]] = message["leaving"]["why"]
                message = {"note": f"{self._told_leaving()}: saving a checkpoint"}
            self.show(message)

    def _told_leaving(self) -> str:
        return "; ".join(f"worker {rank}: {why}" for rank, why in sorted(self._leaving.items()))

    def _look(self, board: Any) -> None:
        """Hears the workers, and passes on to them what they are to do."""
        self._hear(board)
        if self.stop.asked is not None and not self._trains:
            self.stop.raise_asked()
        now = time.monotonic()
        if self._stopping_since is None and (self.stop.asked is not None or self._has_room(now)):
            self._stopping_since = now
            if self.stop.asked is not None:
                self.show({"note": "saving a checkpoint before the end"})
            board.order.remote("stop")
        elif self._stopping_since is not None and now - self._stopping_since > GRACE_S:
            self._stopping_since = None
            if self.stop.asked is not None:
                self.stop.raise_asked()

    def _has_room(self, now: float) -> bool:
        """Whether an elastic training could go on with more workers than it has."""
        if self._leaving or self.num_workers >= self.cluster["num_workers"]:
            return False
        if now - self._looked_for_room < GROW_EVERY_S:
            return False
        self._looked_for_room = now
        return resources.num_fitting(connection.nodes(), resources.of_worker(self.cluster)) > 0

    def _trainer(self, board: Any, token: str) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self.cluster["gpus_per_worker"]
        return TorchTrainer(
            worker_loop,
            train_loop_config={"job": self.job, "board": board, "token": token},
            scaling_config=ScalingConfig(
                num_workers=self.num_workers,
                use_gpu=gpus > 0,
                resources_per_worker=resources.of_worker(self.cluster),
            ),
            # The watchdog, which names the worker that hangs, comes before a collective's own limit.
            torch_config=TorchConfig(
                backend="nccl" if gpus else "gloo", timeout_s=int(max(COLLECTIVE_S, 2 * 60 * self.cluster["hang"]))
            ),
            run_config=RunConfig(
                # A name that was used before would silently go on with what Ray kept under it.
                name=f"{self.job['run_id']}-{uuid.uuid4().hex[:8]}",
                **self.folder.ray_storage(),
                # Starting again is ours: with a pause, a limit, and as many workers as there is room for then.
                failure_config=FailureConfig(
                    max_failures=0,
                    max_preemption_failures=0,  # type: ignore[call-arg]
                    controller_failure_limit=0,
                ),
            ),
        )

    def _ended(
        self, outcome: dict[str, Any] | None, error: BaseException | None, verdict: str | None
    ) -> dict[str, Any] | None:
        from onestage.training.endings import Diverged

        if outcome is not None and "diverged" in outcome:
            raise Diverged(outcome["diverged"])
        if outcome is not None and "stopped" in outcome:
            if self._leaving and self.stop.asked is None:
                why = f"{self._told_leaving()}: stopped with a checkpoint"
                raise Lost(why, raised=False, ranks=list(self._leaving))
            return None
        if outcome is not None:  # a worker lost after the last word was said changes nothing
            return outcome
        if verdict is not None:
            raise Lost("the watchdog ended the workers", raised=False)
        if error is None:
            raise Lost("the workers ended without a result", raised=False)
        cause = _why(error)
        if not self._places and RAY_STORAGE in str(error):  # Ray's own look at it, before any worker's
            raise InputError(
                f"storage={redacted(self.job['config']['storage'])} can't be used on the nodes of the cluster "
                f"({_last_line(error)}): mend it or its permissions there, or pass its credentials on (cluster.env)"
            ) from error
        if isinstance(cause, Lost):
            cause = self._out_of_memory(error) or cause
        raise cause from error

    def _out_of_memory(self, error: BaseException) -> Lost | None:
        """The same loss by its cause, where a host had no memory left."""
        failures = _failures(error)
        for rank, failure in failures.items():
            if (found := memory.ran_out(failure)) is not None:
                host = self._places[rank]["host"] if rank in self._places else None
                return _lost_memory(f"{found} worker {rank}", host=host, ranks=[rank])
        gone = [rank for rank, failure in failures.items() if rank in self._places and _is_gone(failure)]
        for rank, place in {self._places[rank]["node"]: (rank, self._places[rank]) for rank in gone}.values():
            kills = memory.oom_kills_on(place["node"])
            if kills is not None and kills > place["oom_kills"]:
                told = f"the kernel ended a process there, and worker {rank} is gone"
                return _lost_memory(told, host=place["host"], ranks=[rank])
        if (found := memory.ran_out(error)) is not None:
            return _lost_memory(f"{found} a process of the training")
        return None


def _lost_memory(what: str, *, host: str | None = None, ranks: Sequence[int] = ()) -> Lost:
    told = f"out of memory on {host or 'a host of the cluster'}: {what}; {memory.REMEDY}"
    return Lost(told, raised=True, ranks=ranks, kind="out of memory")


class _Fit(threading.Thread):
    """Ray's fit takes over SIGINT in a main thread; beside it, Ctrl-C stays ours, and so does the progress bar."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.error = error


def _why(error: BaseException) -> BaseException:
    """What ended a group: InputError where a worker said so, else Lost with the first cause in one line."""
    failures = _failures(error)
    for failure in failures.values():
        if (refused := _input_error(failure)) is not None:
            return refused
    # Where one worker is gone the others fail too, waiting for it: that one is the cause.
    gone = {rank: failure for rank, failure in failures.items() if _is_gone(failure)}
    told = "; ".join(f"worker {rank}: {_last_line(failure)}" for rank, failure in (gone or failures).items())
    return Lost(told or _last_line(error), raised=bool(failures) and not gone, ranks=list(gone))


def _failures(error: BaseException) -> Mapping[int, BaseException]:
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return failures


def _is_gone(failure: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(getattr(failure, "health_check_failure", failure), RayActorError)


def _input_error(failure: BaseException) -> InputError | None:
    """Bad input that a worker found is the user's to mend, and is said as if it had been found here."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, InputError) or type(cause).__name__ == "InputError":
            return InputError(str(cause))
        cause = cause.__cause__
    return None


def _last_line(error: BaseException) -> str:
    """An error's last line, without the general advice that Ray adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].partition(" Some common causes include")[0].partition(" This is typically caused by")[0]


def worker_loop(config: dict[str, Any]) -> None:
    """One Ray Train worker, from the plain job to the reported metrics."""
    import logging

    import ray
    import torch
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer

    from onestage.cluster import worker
    from onestage.cluster.board import this_host
    from onestage.cluster.leaving import Notice
    from onestage.cluster.watchdog import heart_of
    from onestage.training.endings import Diverged, Stopped
    from onestage.training.pulse import Pulse

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    job, board = config["job"], config["board"]
    rank = ray.train.get_context().get_world_rank()
    settings = job["config"]["cluster"]
    node = ray.get_runtime_context().get_node_id()
    board.put.remote({"placed": Place(rank=rank, host=this_host(), node=node, oom_kills=memory.oom_kills())})
    notice = Notice(rank=rank, say=lambda why: board.put.remote({"leaving": {"rank": rank, "why": why}}))
    torch.set_num_threads(settings["cpus_per_worker"])
    strategy = RayDDPStrategy(
        gradient_as_bucket_view=True,
        # DDP rebuilds its buckets after the first step, and gloo then sums in another order: not after this.
        find_unused_parameters=job["config"]["trainer"]["deterministic"],
    )
    pulse = Pulse()
    storage = job["config"]["storage"]
    try:
        same_place(storage, config["token"])
        check_storage(storage)
        with heart_of(pulse, board, rank=rank) as heart:
            outcome = worker.train(
                job,
                rank=rank,
                world_size=ray.train.get_context().get_world_size(),
                local_rank=ray.train.get_context().get_local_rank(),
                host=this_host(),
                trainer_options={
                    "accelerator": "gpu" if settings["gpus_per_worker"] else "cpu",
                    "devices": "auto" if settings["gpus_per_worker"] else 1,
                    "strategy": strategy,
                    "plugins": [RayLightningEnvironment()],
                },
                prepare=prepare_trainer,
                progress=lambda message: board.put.remote(message),
                pulse=pulse,
                asked=lambda: notice.given() or heart.stop_asked,
            )
    except Diverged as error:
        # An answer, not a failure: the same training would end so again from its last checkpoint.
        outcome = {"diverged": str(error), "metrics": {}}
    except Stopped as error:
        outcome = {"stopped": str(error), "metrics": {}}
    except InputError as error:
        ray.get(board.put.remote({"refused": str(error)}), timeout=BOARD_S)
        raise
    if rank == 0:
        ray.get(board.finish.remote(outcome), timeout=BOARD_S)
    ray.train.report(outcome["metrics"])
