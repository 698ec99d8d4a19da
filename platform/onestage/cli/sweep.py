"""``onestage sweep …`` and ``onestage train -m …``: many trainings, and which of them to keep."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.sweeps.sweep import Outcome

HELP = """\
usage: onestage sweep [KEY=VALUES …] [--dry-run] [--json]      the same as onestage train -m
       onestage sweep resume NAME [KEY=VALUE …] [--json]       go on where it was cut
       onestage sweep status [NAME] [KEY=VALUE …] [--json]     how it stands; mends what a crash left in MLflow

Many trainings, as trials of Ray Tune on one cluster, and the best of them. What varies is said in Hydra's words:

  onestage sweep detector=yolov3,retinanet_r50 data.root=shards/mine               every choice
  onestage sweep optimizer.lr='tag(log, interval(1e-4, 1e-1))' budget.trials=20 data.root=…
  onestage sweep sweep=all_detectors budget.hours=8 data.root=… cluster=ray        a ready space: {spaces}

  sweep.name=…                           of its folder and of its run in MLflow; else the time
  sweep.search=grid|random|optuna        null: grid, or random where there is an interval
  sweep.scheduler=none|asha|median|pbt   when a trial is not worth going on with
  budget.trials=… budget.hours=… budget.gpu_hours=…   the first that is reached ends the sweep, with the best so far
  sweep.max_concurrent=… sweep.metric=… on_oom=shrink sweep.champion=MODEL
  cluster.num_workers=…                  workers of each trial; trials run side by side as there is room

--dry-run says what would be done, and with probe=true how long it would take, measured; it starts no trial.
--json prints one JSON object last on stdout: sweep, ended, best, runs, champion.
Exit codes: 0 all trials done, 1 failed, 2 wrong usage or input, 3 cut by hours or GPU-hours, 75 preempted,
130 interrupted (once: running trials save first; twice: at once).
"""


def sweep(arguments: Sequence[str]) -> int:
    """The verb, behind its name."""
    if any(one in ("-h", "--help") for one in arguments):
        from onestage.config.folder import options

        spaces = ", ".join(name for name in options("sweep") if name != "default")
        print(HELP.format(spaces=spaces))
        return DONE
    flags = [one for one in arguments if one.startswith("-")]
    words = [one for one in arguments if not one.startswith("-")]
    if unknown := [one for one in flags if one not in ("--json", "--dry-run", "-m", "--multirun")]:
        raise InputError(f"no option {unknown[0]}: onestage sweep --help")
    as_json = "--json" in flags or "output=json" in words
    verb = words[0] if words and words[0] in ("resume", "status") else "start"
    if verb == "start":
        names, overrides = [], words
    else:
        names = [one for one in words[1:] if "=" not in one]
        overrides = [one for one in words[1:] if "=" in one]
    if verb == "status":
        return _status(names, overrides, as_json)
    if "--dry-run" in flags and verb == "resume":
        raise InputError("--dry-run is for a sweep that has not begun: leave resume NAME out")
    if "--dry-run" in flags:
        return _dry_run(overrides, as_json)
    if verb == "resume" and len(names) != 1:
        raise InputError("name one sweep: onestage sweep resume NAME")
    if (code := _elsewhere([*([verb] if names else []), *names], overrides)) is not None:
        return code
    from onestage.sweeps import supervisor

    if supervisor.is_watched():
        with supervisor.own_end():
            return _here(names, overrides, as_json)
    if (code := _watched(names, overrides, flags)) is not None:
        return code
    return _here(names, overrides, as_json)


def _here(names: Sequence[str], overrides: Sequence[str], as_json: bool) -> int:
    """A new sweep, or the one of that name, in this process."""
    from onestage.sweeps import sweep as sweeps

    outcome = sweeps.resume(names[0], overrides, storage=_storage(overrides)) if names else sweeps.start(overrides)
    return _told(outcome, as_json)


def _watched(names: Sequence[str], overrides: Sequence[str], flags: Sequence[str]) -> int | None:
    """On a cluster, the exit code of the sweep in a process that may be lost; None where it has a Ray of its own."""
    from onestage.cluster.job import JOB_VARIABLE
    from onestage.cluster.restarts import Restarts
    from onestage.config import compose, merged
    from onestage.config.space import fixed
    from onestage.sweeps import supervisor
    from onestage.sweeps.folder import SETUP, Setup, folder_of, journal_of, kept, name_of

    overrides, storage = kept(overrides), _storage(overrides)
    before = Setup.load(folder_of(storage, names[0])).overrides if names else []
    config = compose("train", fixed(merged(before, overrides)))
    if config["cluster"]["kind"] != "ray" or JOB_VARIABLE in os.environ:  # a job is lost with its head as a whole
        return None
    name = names[0] if names else name_of(config["sweep"])
    folder = folder_of(storage, name)
    goes_on = ["resume", name, f"storage={storage}", *flags]
    first = ["resume", name, *overrides, *flags] if names else [*overrides, f"sweep.name={name}", *flags]

    def reached() -> int:
        return sum(len(trial.results) + trial.ended for trial in journal_of(folder).trials.values())

    return supervisor.run(
        first,
        again=lambda: goes_on if (folder / SETUP).exists() else first,
        reached=reached,
        restarts=Restarts(limit=config["cluster"]["max_failures"], backoff_s=config["cluster"]["backoff_s"]),
    )


def _elsewhere(names: Sequence[str], overrides: Sequence[str]) -> int | None:
    """Where ``cluster.address`` takes jobs, the exit code of the one that the sweep is there; None where it is here."""
    from onestage.cluster.job import is_sent
    from onestage.config import compose
    from onestage.config.space import fixed

    config = compose("train", fixed(overrides))
    if not is_sent(config["cluster"]):
        return None
    from onestage.cluster.queue import submit_and_follow

    return submit_and_follow("sweep", overrides, config, names=names)


def _told(outcome: "Outcome", as_json: bool) -> int:
    from onestage.tracking.leaderboard import best_of

    found, verdict = outcome.conclusion.entries, outcome.conclusion.verdict
    best = best_of(found)
    if as_json:
        print(
            json.dumps(
                {
                    "sweep": outcome.name,
                    "ended": outcome.ended,
                    "folder": str(outcome.folder),
                    "best": asdict(best) if best else None,
                    "runs": [asdict(one) for one in found],
                    "champion": asdict(verdict) if verdict else None,
                }
            )
        )
    else:
        from onestage.cli.leaderboard import show

        show(found)
        if verdict is not None:
            print(verdict)
        for picture in outcome.conclusion.pictures:
            print(picture)
    if outcome.ended == "all failed":
        print(f"onestage: all trials failed: onestage sweep status {outcome.name} says why", file=sys.stderr)
    elif outcome.ended != "all":
        more = {"hours": " budget.hours=…", "gpu_hours": " budget.gpu_hours=…"}.get(outcome.ended, "")
        print(f"onestage: {outcome.ended}; go on with: onestage sweep resume {outcome.name}{more}", file=sys.stderr)
    return outcome.exit_code


def _status(names: Sequence[str], overrides: Sequence[str], as_json: bool) -> int:
    from onestage.sweeps import status

    if len(names) > 1:
        raise InputError("name one sweep, or none for all: onestage sweep status [NAME]")
    storage = _storage(overrides)
    if not names:
        listed = status.all_of(storage)
        if as_json:
            print(json.dumps({"sweeps": [asdict(one) for one in listed]}))
        else:
            status.show_all(listed, storage)
        return DONE
    found = status.mended(names[0], storage)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        status.show(found, storage)
    return DONE


def _dry_run(overrides: Sequence[str], as_json: bool) -> int:
    from onestage.sweeps import forecast

    probe = [one for one in overrides if one.startswith("probe=")]
    if any(one not in ("probe=true", "probe=false") for one in probe):
        raise InputError(f"{probe[-1]}: say probe=true or probe=false")
    told = forecast.forecast([one for one in overrides if one not in probe], probe="probe=true" in probe[-1:])
    if as_json:
        print(json.dumps(asdict(told)))
    else:
        forecast.show(told)
    return DONE


def _storage(overrides: Sequence[str]) -> str:
    from onestage.config import compose

    config: dict[str, Any] = compose("train", [one for one in overrides if one.startswith("storage=")])
    return str(config["storage"])
