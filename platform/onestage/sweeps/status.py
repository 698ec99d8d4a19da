"""How a sweep stands, seen from outside of it; and what a crash left untrue in MLflow, made true."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from onestage.errors import InputError
from onestage.sweeps.folder import SETUP, Setup, State, folder_of, journal_of
from onestage.sweeps.watch import mark, overview
from onestage.tracking import runs

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._journal import Journal


@dataclass(frozen=True, kw_only=True)
class Status:
    """``state``: running, ended, or died, which ``onestage sweep resume`` goes on with; ``trials`` by their states."""

    name: str
    state: str
    trials: dict[str, int]
    best: float | None
    metric: str
    mended: list[str]  # run ids whose state in MLflow was made true


def all_of(storage: str) -> list[Status]:
    """The sweeps of a storage, the newest first."""
    found = [(file.parent, Setup.load(file.parent)) for file in folder_of(storage, "x").parent.glob(f"*/{SETUP}")]
    found.sort(key=lambda one: one[1].started, reverse=True)
    return [_status_or_damage(folder, setup) for folder, setup in found]


def _status_or_damage(folder: Path, setup: Setup) -> Status:
    """One that can't be read is no reason not to list the others."""
    try:
        return _status(folder, setup, [])
    except InputError as error:
        return Status(name=setup.name, state=str(error), trials={}, best=None, metric=setup.metric, mended=[])


def mended(name: str, storage: str) -> Status:
    """One sweep; where nobody is at work on it any more, its runs are RUNNING no longer. Raises InputError."""
    folder = folder_of(storage, name)
    setup = Setup.load(folder)
    journal = journal_of(folder)
    made_true: list[str] = []
    if setup.tracking_uri is not None and not journal.at_work:
        made_true = mend(folder, setup, journal)
        if setup.parent and runs.end_if_running(setup.tracking_uri, setup.parent, "it ended without a word"):
            made_true.append(setup.parent)
    return _status(folder, setup, made_true)


def mend(folder: Path, setup: Setup, journal: "Journal") -> list[str]:
    """Makes the trials' runs in MLflow what the journal of a sweep at rest says; those that were RUNNING still.

    Where the server does not answer it is not asked for the other trials.
    """
    were_running: list[str] = []
    for trial in journal.trials.values():
        state = State.load(folder / str(trial.number))
        if setup.tracking_uri is None or state.run_id is None:
            continue
        if runs.end_if_running(setup.tracking_uri, state.run_id, "its sweep ended without a word"):
            were_running.append(state.run_id)
        if not mark(setup, trial, state):
            words = f"MLflow is away: `onestage sweep status {setup.name}` sets the runs' states later"
            print(f"onestage: {words}", file=sys.stderr)
            break
    return were_running


def _status(folder: Path, setup: Setup, made_true: list[str]) -> Status:
    journal = journal_of(folder)
    unfinished = "running" if journal.at_work else "cut"
    states = [trial.state if trial.state != "unfinished" else unfinished for trial in journal.trials.values()]
    best = journal.best(setup.sign)
    ended = f"ended ({journal.ended_because})" if journal.ended_because else "died"
    return Status(
        name=setup.name,
        state="running" if journal.at_work else ended,
        trials={state: states.count(state) for state in dict.fromkeys(states)},
        best=best.value if best else None,
        metric=setup.metric,
        mended=made_true,
    )


def show(found: Status, storage: str) -> None:
    """Its trials, and what to do next."""
    folder = folder_of(storage, found.name)
    console = Console()
    console.print(overview(folder, Setup.load(folder), journal_of(folder)))
    console.print(f"{found.state}, in {folder}", highlight=False, soft_wrap=True)
    if found.mended:
        console.print(f"{len(found.mended)} runs in MLflow were still RUNNING: now they are KILLED", highlight=False)
    if found.state != "running" and found.state != "ended (all)":
        console.print(f"go on with: onestage sweep resume {found.name}", highlight=False)


def show_all(listed: list[Status], storage: str) -> None:
    """One line a sweep."""
    if not listed:
        print(f"no sweep in {folder_of(storage, 'x').parent}")
        return
    table = Table("sweep", "state", "trials", "best")
    for one in listed:
        trials = ", ".join(f"{count} {state}" for state, count in one.trials.items())
        table.add_row(one.name, one.state, trials, f"{one.metric} {one.best:.4f}" if one.best is not None else "")
    Console().print(table)
