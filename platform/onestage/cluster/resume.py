"""Which run to go on with, and how."""

import json
from pathlib import Path
from typing import Any

from onestage.cluster.storage import RunFolder
from onestage.config import compose, merged
from onestage.data.store import is_address, redacted
from onestage.errors import InputError


def resumed(config: dict[str, Any], uri: str | None) -> dict[str, Any]:
    """The config of the run to go on with, changed by what the command line says now."""
    storage, run_id = config["storage"], config["resume"]
    if run_id == "last":
        run_id = _last_unfinished(config, storage, uri)
    stored = RunFolder(storage, run_id).fetch("config.json")
    if stored is None:
        place = redacted(storage) if is_address(storage) else Path(storage).absolute()
        raise InputError(f"resume={run_id}: no such run under {place}; storage=… names another folder")
    try:
        before = list(json.loads(stored.read_text())["overrides"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"resume={run_id}: {stored} is damaged: bring it back from a copy, or train anew") from error
    return compose("train", merged(before, config["overrides"], [f"resume={run_id}"]))


def _last_unfinished(config: dict[str, Any], storage: str, uri: str | None) -> str:
    experiment = config["tracking"]["experiment"]
    if uri is not None:
        from onestage.tracking import runs

        runs.mark_dead(uri, experiment)
        found = runs.last_unfinished(uri, experiment)
    elif is_address(storage):
        raise InputError(f"resume=last does not look through {redacted(storage)} without tracking: name the run's id")
    else:
        unfinished = [
            path.parent for path in Path(storage).glob("*/config.json") if not (path.parent / "model").exists()
        ]
        found = max(unfinished, key=lambda path: path.stat().st_mtime).name if unfinished else None
    if found is None:
        raise InputError(f"resume=last: experiment {experiment!r} has no unfinished run")
    return found
