"""What is seen of a sweep while it runs: a table at the terminal, lines in a file, and true states in MLflow.

Everything is read from the sweep's folder, so that a look from another process (``onestage sweep status``) is the same.
"""

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from onestage.cluster.launch import chosen
from onestage.errors import DONE, FAILED, OUT_OF_BUDGET, WRONG_INPUT
from onestage.sweeps.folder import WAITING, Setup, State, journal_of
from onestage.tracking import runs
from onestage.tracking.leaderboard import MAP, Entry, in_short, ranked

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._journal import Journal, Trial

LOOK_EVERY_S: Final = 1.0
MAX_ROWS: Final = 30
STATUS: Final[dict[str, runs.Ending]] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "lost": "KILLED"}
STYLES: Final = {"done": "green", "stopped": "dim", "failed": "red", "lost": "yellow"}


class Watch(threading.Thread):
    """Looks at a sweep's folder until its block is left, and then keeps the parent's run open for its last words."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        super().__init__(name="sweep-watch", daemon=True)
        self.folder, self.setup = folder, setup
        self.console = Console(stderr=True)
        self.over = threading.Event()
        # By trial, the state that MLflow and the terminal know: of a sweep that goes on, those that have ended.
        self.told: dict[int, str] = {one.number: one.state for one in journal_of(folder).trials.values() if one.ended}
        self.waiting: set[int] = set()  # trials whose wait was said
        self.read: tuple[int, Journal] | None = None  # with the size that its file had
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(timeout=30)
        if self.console.is_terminal:
            self.live.stop()
        self._look()

    def run(self) -> None:
        while not self.over.wait(LOOK_EVERY_S):
            try:
                self._look()
            except Exception as error:  # a look that fails is no reason to end a sweep
                self.console.print(f"the table can't be shown: {error}", style="yellow", highlight=False)

    def end(self, code: int, reason: str | None) -> None:
        """Ends the parent's run in MLflow."""
        if self.setup.tracking_uri is None or self.setup.parent is None:
            return
        status: dict[int, runs.Ending] = {
            DONE: "FINISHED",
            OUT_OF_BUDGET: "FINISHED",
            FAILED: "FAILED",
            WRONG_INPUT: "FAILED",
        }
        runs.end_run(self.setup.tracking_uri, self.setup.parent, status.get(code, "KILLED"), reason)

    def _journal(self) -> "Journal":
        """As it is now; read only where it has grown, as those of long sweeps have many thousand lines."""
        from hydra_plugins.ray_tune_sweeper._journal import NAME

        file = self.folder / NAME
        size = file.stat().st_size if file.exists() else 0
        if self.read is None or self.read[0] != size:
            self.read = (size, journal_of(self.folder))
        return self.read[1]

    def _look(self) -> None:
        journal = self._journal()
        for trial in journal.unfinished():
            self._say_wait(trial)
        for trial in journal.trials.values():
            if self.told.get(trial.number, "unfinished") != trial.state:
                self.told[trial.number] = trial.state
                self._tell(journal, trial)
        if self.console.is_terminal:
            self.live.update(overview(self.folder, self.setup, journal))

    def _say_wait(self, trial: "Trial") -> None:
        """Once, when it begins."""
        doing = State.load(self.folder / str(trial.number)).doing
        if not doing.startswith(WAITING):
            self.waiting.discard(trial.number)
        elif trial.number not in self.waiting:
            self.waiting.add(trial.number)
            self._say(f"#{trial.number} {doing}", "yellow")

    def _say(self, text: str, style: str) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _tell(self, journal: "Journal", trial: "Trial") -> None:
        state = State.load(self.folder / str(trial.number))
        if trial.state != "unfinished":
            best = journal.best(self.setup.sign)
            so_far = f" (best: {best.value:.4f} of #{best.number})" if best and best.value is not None else ""
            score = f"{self.setup.metric} {state.score:.4f}" if state.score is not None else ""
            says = ", ".join(filter(None, (f"epoch {state.epoch}", score, trial.reason)))
            self._say(f"#{trial.number} {trial.state}: {says}{so_far}", STYLES[trial.state])
        mark(self.setup, trial, state)


def mark(setup: Setup, trial: "Trial", state: State) -> bool:
    """Says in MLflow how a trial ended. False where the server is away: `onestage sweep status` does so later."""
    if setup.tracking_uri is None or state.run_id is None:
        return True
    hours = trial.spent_s / 3600 * setup.gpus_of_trial
    tags = {
        runs.STATE_TAG: trial.state,
        runs.GPU_HOURS_TAG: f"{hours:.6f}",
        runs.EPOCHS_TAG: str(state.epoch),
        **runs.point_tags(trial.point),
    }
    if state.score is not None:
        tags |= {runs.SCORE_TAG: repr(state.score), runs.METRIC_TAG: setup.metric}
    if trial.reason is not None:
        tags[runs.REASON_TAG] = trial.reason
    told = runs.tell(setup.tracking_uri, state.run_id, tags)
    if told and trial.state == "lost":
        runs.end_if_running(setup.tracking_uri, state.run_id, trial.reason or "its process was lost")
    return told


def overview(folder: Path, setup: Setup, journal: "Journal") -> Group:
    """All trials, those that run first, then the best."""
    running = [one for one in journal.trials.values() if one.state == "unfinished"]
    ended = sorted(
        (one for one in journal.trials.values() if one.state != "unfinished"),
        key=lambda one: (one.value is None, -setup.sign * (one.value or 0.0)),
    )
    best = journal.best(setup.sign)
    table = Table("trial", "state", "epoch", "loss", setup.metric, "left", "with", box=None, header_style="bold")
    for trial in [*running, *ended][:MAX_ROWS]:
        state = State.load(folder / str(trial.number))
        score = state.score if state.score is not None else trial.value
        table.add_row(
            f"#{trial.number}",
            Text(_doing(trial, state, journal), style=STYLES.get(trial.state, "cyan")),
            f"{state.epoch}/{state.num_epochs}" if state.num_epochs else "",
            f"{state.loss:.3f}" if state.loss is not None else "",
            Text("" if score is None else f"{score:.4f}", style="bold green" if best and best is trial else ""),
            _left(trial, state) if journal.at_work else "",
            in_short(trial.point),
        )
    unfinished = "running" if journal.at_work else "cut"
    states = [one.state if one.state != "unfinished" else unfinished for one in journal.trials.values()]
    named = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    hidden = len(running) + len(ended) - MAX_ROWS
    head = f"sweep {setup.name}: {named or 'no trial yet'}"
    return Group(Text(head, style="bold"), table, *([Text(f"and {hidden} more")] if hidden > 0 else []))


def _doing(trial: "Trial", state: State, journal: "Journal") -> str:
    if trial.state != "unfinished":
        return trial.state
    return state.doing if journal.at_work else "cut"


def _left(trial: "Trial", state: State) -> str:
    if trial.state != "unfinished" or not (state.step and state.num_steps and trial.started):
        return ""
    seconds = (time.time() - trial.started) * max(state.num_steps - state.step, 0) / state.step
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def entries(folder: Path, setup: Setup, *, dataset_hash: str | None) -> list[Entry]:
    """The sweep's trials as a leaderboard has them, the best first."""
    journal = journal_of(folder)
    found = [
        _entry(folder, setup, trial, journal.at_work, dataset_hash=dataset_hash) for trial in journal.trials.values()
    ]
    return ranked(found, setup.sign)


def _entry(folder: Path, setup: Setup, trial: "Trial", at_work: bool, *, dataset_hash: str | None) -> Entry:
    state = State.load(folder / str(trial.number))
    score = state.score if state.score is not None else trial.value
    of_map = setup.metric == MAP and state.score is not None
    return Entry(
        run_id=state.run_id or "",
        name=f"{setup.name} #{trial.number}",
        status=STATUS[trial.state] if trial.ended else "RUNNING" if at_work else "KILLED",
        detector=chosen({"overrides": trial.overrides}),
        dataset_hash=dataset_hash,
        score=score,
        low=state.metrics.get("best/map_low") if of_map else None,
        high=state.metrics.get("best/map_high") if of_map else None,
        epochs=state.epoch or None,
        gpu_hours=trial.spent_s / 3600 * setup.gpus_of_trial,
        latency_ms=state.outcome.get("perf/latency_ms"),
        started=trial.started,
        ended=trial.ended_at,
        trial=trial.number,
        state=trial.state if trial.state != "unfinished" else "running" if at_work else "cut",
        reason=trial.reason,
        metric=setup.metric,
        point=trial.point,
    )
