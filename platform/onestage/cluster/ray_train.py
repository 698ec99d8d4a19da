"""A training as Ray Train workers: this machine for now, the same code for more."""

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onestage.cluster.job import Job
from onestage.errors import InputError

POLL_S = 0.3


def run(job: Job, *, cores: int, gpus: int, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Starts Ray on this machine, trains on ``cluster.num_workers`` workers, and ends what it started.

    ``show`` gets the training's progress. Raises what ended the training; KeyboardInterrupt ends the workers at once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a training beside any other process
    timeout_s = job["config"]["cluster"]["start_timeout_s"]
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(timeout_s))
    if "RAY_AUTH_MODE" not in os.environ:  # a token of this process; Ray would leave one in the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray  # reads its settings from the environment when it is imported

    with _own_sigterm():
        ray.init(
            address="local",
            num_cpus=cores,
            num_gpus=gpus,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
        )
    try:
        return _fit(job, show)
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's start takes SIGTERM over, to print a C++ stack; it is given back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _fit(job: Job, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from onestage.training.divergence import Diverged

    cluster = job["config"]["cluster"]
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    gpus = cluster["gpus_per_worker"]
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=cluster["num_workers"],
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster["cpus_per_worker"], **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        run_config=RunConfig(
            name=job["run_id"],
            storage_path=str(Path(job["folder"]) / "ray"),
            failure_config=FailureConfig(  # unbounded, a controller that can't get its workers would retry for ever
                max_failures=cluster["max_failures"],
                controller_failure_limit=max(cluster["max_failures"], 1),  # type: ignore[call-arg]
            ),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    # Ray's fit takes over SIGINT in a main thread; beside it, Ctrl-C stays ours, and so does the progress bar.
    thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        for message in ray.get(board.take.remote(), timeout=60):
            if "refused" in message:  # it would be refused again: not waiting for Ray to start it anew
                raise InputError(message["refused"])
            show(message)
    if "error" in outcome:
        raise _cause(outcome["error"])
    result: dict[str, Any] | None = ray.get(board.result.remote(), timeout=60)
    if result is None:
        raise RuntimeError("the workers ended without a result")
    if "diverged" in result:
        raise Diverged(result["diverged"])
    return result


def _cause(error: BaseException) -> BaseException:
    """Bad input that a worker found is the user's to mend, and is said as if it had been found here."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, InputError) or type(cause).__name__ == "InputError":
                return InputError(str(cause))
            cause = cause.__cause__
    return error


class Board:
    """Between the workers and the driver, wherever each runs: what rank 0 says, until the driver takes it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.outcome: dict[str, Any] | None = None

    def put(self, message: dict[str, Any]) -> None:
        self.messages = [*self.messages[-99:], message]

    def take(self) -> list[dict[str, Any]]:
        taken, self.messages = self.messages, []
        return taken

    def finish(self, outcome: dict[str, Any]) -> None:
        self.outcome = outcome

    def result(self) -> dict[str, Any] | None:
        return self.outcome


def worker_loop(config: dict[str, Any]) -> None:
    """One Ray Train worker, from the plain job to the reported metrics."""
    import logging

    import ray
    import torch
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer

    from onestage.cluster import worker
    from onestage.training.divergence import Diverged

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    job, board = config["job"], config["board"]
    rank = ray.train.get_context().get_world_rank()
    settings = job["config"]["cluster"]
    torch.set_num_threads(settings["cpus_per_worker"])
    strategy = RayDDPStrategy(
        gradient_as_bucket_view=True,
        # DDP rebuilds its buckets after the first step, and gloo then sums in another order: not after this.
        find_unused_parameters=job["config"]["trainer"]["deterministic"],
    )
    try:
        outcome = worker.train(
            job,
            rank=rank,
            trainer_options={
                "accelerator": "gpu" if settings["gpus_per_worker"] else "cpu",
                "devices": "auto" if settings["gpus_per_worker"] else 1,
                "strategy": strategy,
                "plugins": [RayLightningEnvironment()],
            },
            prepare=prepare_trainer,
            progress=lambda message: board.put.remote(message),
        )
    except Diverged as error:
        # An answer, not a failure: Ray would start the same training again from its last checkpoint.
        outcome = {"diverged": str(error), "metrics": {}}
    except InputError as error:
        ray.get(board.put.remote({"refused": str(error)}), timeout=60)
        raise
    if rank == 0:
        ray.get(board.finish.remote(outcome))
    ray.train.report(outcome["metrics"])
