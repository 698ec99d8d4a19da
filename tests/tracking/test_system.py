"""What a machine does while it trains, under MLflow's own names, and without waiting for a store."""

import time
from collections.abc import Mapping

import psutil

from onestage.tracking import runs
from onestage.tracking.system import SystemMetrics


class Logged:
    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((dict(metrics), step))


def until(logged: Logged, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(logged.lines) < number and time.monotonic() < deadline:
        sum(range(100_000))  # something for a core to do


def test_samples_of_a_node_lie_at_the_seconds_of_the_run(store: str) -> None:
    run_id = runs.open_run(store, "system", tags={})
    began, logged = time.time(), Logged()
    with SystemMetrics(uri=store, run_id=run_id, node="node-a", log=logged, every_s=1.0):
        until(logged, 3)
    steps = [step for _, step in logged.lines]
    assert len(steps) >= 3 and steps == sorted(set(steps))
    assert steps[-1] <= time.time() - began + 1
    first = logged.lines[0][0]
    assert {name.rsplit("/", 1)[0] for name in first} == {"system/node-a"}
    assert first["system/node-a/cpu_utilization_percentage"] > 0
    total = psutil.virtual_memory().total / 1e6
    used = first["system/node-a/system_memory_usage_megabytes"]
    assert 0 < used < total
    assert abs(first["system/node-a/system_memory_usage_percentage"] - 100 * used / total) < 1
    assert all(0 <= line["system/node-a/cpu_utilization_percentage"] <= 100 for line, _ in logged.lines)


def test_a_store_that_is_away_costs_no_time_and_logs_nothing() -> None:
    logged = Logged()
    with SystemMetrics(uri="http://127.0.0.1:9", run_id="0" * 32, node="a", log=logged, every_s=0.1):
        time.sleep(0.5)
        left = time.monotonic()
    assert time.monotonic() - left < 3
    assert logged.lines == []
