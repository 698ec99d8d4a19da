"""What watches a running sweep: the journal is written, each start and end said, and reasons to end it all are seen."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Callback, Stopper
from ray.tune.result import AUTO_RESULT_KEYS
from ray.tune.utils import flatten_dict

from hydra_plugins.ray_tune_sweeper import _cluster
from hydra_plugins.ray_tune_sweeper._journal import Journal
from hydra_plugins.ray_tune_sweeper._search import Search
from hydra_plugins.ray_tune_sweeper._trial import CUT, FAILED, LAST, LOST, RETURNED, STOPPING, WORKING_DIR

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._sweep import Sweep

log = logging.getLogger(__name__)

TUNES_OWN = {*AUTO_RESULT_KEYS, "should_checkpoint", "done", "trial_id"} - {"training_iteration", "time_total_s"}
WAITING_S = 10.0


class Stop(Stopper):
    """Ends the whole sweep: out of time, asked to by a signal, or because it can't be what was meant."""

    def __init__(
        self,
        journal: Journal,
        folder: Path,
        *,
        stop_s: float,
        hours: float | None = None,
        trial_hours: float | None = None,
    ) -> None:
        self.journal = journal
        self.stop_s = stop_s
        self.mark = folder / STOPPING
        self.mark.unlink(missing_ok=True)
        self.deadline = time.time() + hours * 3600 if hours else math.inf
        self.trial_hours = trial_hours or math.inf
        self.reason: str | None = None
        self.signal: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes it down, for a resume that is not ours

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.reason is None and time.time() >= self.deadline:
            self.reason = "hours"
        if self.reason is None and self.journal.spent_s(time.time()) >= self.trial_hours * 3600:
            self.reason = "trial_hours"
        if self.reason is not None:
            self.mark.touch()
        return self.reason is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Once: stop cleanly. Twice: what the signal did before."""
        former: dict[int, Any] = {}

        def ask(number: int, frame: Any) -> None:
            self.reason, self.signal = "interrupted", number
            signal.signal(number, former[number])
            log.warning(f"stopping: running trials have {self.stop_s:g} s to end; once more: at once")

        if current_thread() is main_thread():
            former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


class Recorder(Callback):
    """Writes the journal while Tune runs, says a line for each start and end, and sees that there is a metric."""

    def __init__(self, sweep: "Sweep", search: Search, stop: Stop) -> None:
        self.sweep, self.journal, self.search, self.stop = sweep, sweep.journal, search, stop
        self.idle_since = self.said = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if any(trial.status == "RUNNING" for trial in trials):
            self.idle_since = now
        elif now - max(self.idle_since, self.said) > WAITING_S:
            self.said = now
            free = _cluster.named(ray.available_resources())
            asked = " and ".join(map(_cluster.named, self.sweep.settings.bundles))
            waited, limit = now - self.idle_since, self.sweep.settings.wait_s
            log.warning(f"waiting for {asked} for a trial, {waited:.0f} s of {limit:.0f} s; free: {free}")
            if waited > limit:
                self.stop.reason = f"no room for a trial for {waited:.0f} s: free what others take, or raise wait_s"

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, point = int(trial.custom_trial_name), trial.config["point"]
        overrides = self.sweep.space.overrides(point)
        self.journal.add("start", trial=number, point=point, overrides=overrides)
        log.info(f"\t#{number} : {' '.join(overrides)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if any(key in result for key in LAST):
            return
        flat = flatten_dict(result)
        metrics = {k: plain(v) for k, v in flat.items() if k.split("/")[0] not in TUNES_OWN}
        self.journal.add("result", trial=int(trial.custom_trial_name), metrics=metrics)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, result, metric = int(trial.custom_trial_name), trial.last_result or {}, self.sweep.metric
        if CUT in result:
            return  # it was asked to end with the sweep, and is to go on with it
        reported = [r[metric] for r in self.journal.trials[number].results if metric in r]
        value = plain(flatten_dict(result).get(metric, reported[-1] if reported else None))
        if LOST in result:
            self._lose(number, result[LOST])
        elif FAILED in result:
            self._end(number, "failed", reason=result[FAILED])
        elif value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            self._end(number, "failed", reason=f"{metric} is {value}")
        elif RETURNED in result:
            returned, folder = result[RETURNED], result.get(WORKING_DIR)
            self._end(number, "done", value=value, returned=returned, working_dir=folder)
            self._check_metric(number, value)
        else:
            self._end(number, "stopped", value=value, reason=f"by {self.sweep.settings.scheduler}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = int(trial.custom_trial_name)
        text = Path(trial.error_file).read_text() if trial.error_file else "unknown"
        self._lose(number, " ".join(text.split("\n", 1)[-1].split())[:500])

    def _lose(self, number: int, reason: str) -> None:
        self._end(number, "lost", reason=reason)
        if self.journal.trials[number].losses <= self.sweep.settings.retries:
            self.search.again.append(number)

    def _end(self, number: int, state: str, **fields: Any) -> None:
        self.journal.add("end", trial=number, state=state, **fields)
        value, best = fields.get("value"), self.journal.best(self.sweep.sign)
        says = f"{self.sweep.metric}={value:g}" if value is not None else fields.get("reason") or ""
        so_far = f" (best: #{best.number}, {best.value:g})" if best else ""
        log.info(f"\t#{number} {state}: {says}{so_far}")

    def _check_metric(self, number: int, value: float | None) -> None:
        settings, metric = self.sweep.settings, self.sweep.metric
        results = [result for trial in self.journal.trials.values() for result in trial.results]
        if self.sweep.scheduled and not any(metric in result for result in results):
            keys = sorted({key for result in results for key in result}) or ["nothing"]
            self.stop.reason = (
                f"scheduler={settings.scheduler} has nothing to go by: trial {number} ended without having reported "
                f"'{metric}', but {', '.join(keys)}: set hydra.sweeper.metric, or call ray.tune.report({{...}})"
            )
        elif value is None and (settings.metric or self.sweep.search_name == "optuna"):
            self.stop.reason = (
                f"trial {number} ended without '{metric}': set hydra.sweeper.metric to a key that the app "
                "reports, or return a number from its function"
            )


def plain(value: Any) -> Any:
    """A number as Python's own, other things as text where JSON has no word for them."""
    value = value.item() if hasattr(value, "item") else value
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
