"""What a machine does while it trains: MLflow's own system metrics, on the way that all other numbers go."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType
from typing import Any, Final, Self

from onestage.tracking.client import client, set_defaults
from onestage.tracking.delivery import SYSTEM

EVERY_S: Final = 10.0
END_S: Final = 1.0


class SystemMetrics:
    """Within this a thread samples this machine every ``every_s`` seconds: its cores, memory, disk, network and GPUs.

    ``log`` gets the numbers as ``system/NODE/…``, the names that MLflow's own tab shows, with the second of the run as
    their step: the dashboard draws all nodes over one axis, and a resumed run goes on where it was. Until the store
    has said when the run began nothing is logged.
    """

    def __init__(
        self,
        *,
        uri: str,
        run_id: str,
        node: str,
        log: Callable[[Mapping[str, float], int], None],
        every_s: float = EVERY_S,
    ) -> None:
        self._uri = uri
        self._run_id = run_id
        self._prefix = f"{SYSTEM}{node}/"
        self._log = log
        self._every_s = every_s
        self._ended = Event()
        self._thread = Thread(target=self._work, name="onestage-system", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(END_S)  # it may be waiting for a store that is away

    def _work(self) -> None:
        began: float | None = None
        monitors = _monitors()
        with suppress(Exception):
            for monitor in monitors:
                _sample(monitor)  # psutil counts cores' use from the call before: the first says 0
        while not self._ended.wait(self._every_s):
            try:
                began = began if began is not None else self._began()
                metrics = {name: value for monitor in monitors for name, value in _sample(monitor).items()}
            except Exception as error:  # the store is away, or a driver of a GPU was unloaded: the next try may do
                logging.getLogger(__name__).debug("no system metrics: %s", error)
                continue
            self._log({f"{self._prefix}{name}": value for name, value in metrics.items()}, int(time.time() - began))

    def _began(self) -> float:
        return float(client(self._uri).get_run(self._run_id).info.start_time) / 1000


def _monitors() -> list[Any]:
    set_defaults()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no GPU of NVIDIA's here
        monitors.append(GPUMonitor())
    return monitors


def _sample(monitor: Any) -> dict[str, float]:
    monitor.clear_metrics()
    monitor.collect_metrics()
    return {name: float(value) for name, value in monitor.aggregate_metrics().items()}
