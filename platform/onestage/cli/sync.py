"""``onestage sync``: sends what trainings could not, because their tracking store was away or they died."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestage.cli.terminal import plain, steps
from onestage.errors import DONE, FAILED, InputError

if TYPE_CHECKING:
    from onestage.tracking.sync import Synced


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    sync = verbs.add_parser("sync", help="send to MLflow what trainings that ended or died could not")
    sync.add_argument(
        "what", nargs="?", metavar="FOLDER|RUN_ID", help="a run, its spool, or a storage (default: all of storage)"
    )
    sync.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="storage=…, tracking.uri=…")
    sync.add_argument("--json", action="store_true", help="one JSON object on stdout")
    sync.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> int:
    from onestage.config import compose
    from onestage.tracking import sync

    if "=" in (options.what or "") and not Path(options.what).exists():  # nothing was named
        options.overrides.insert(0, options.what)
        options.what = None
    config = compose("train", options.overrides)
    named = any(one.startswith("tracking.uri=") for one in options.overrides)
    spools = _named(options.what, config["storage"]) if options.what else _all(config["storage"])
    found: list[Synced] = []
    with steps("B") as step:
        for folder in spools:
            tell = step(folder.parent.name)
            found.append(sync.sync(folder, uri=config["tracking"]["uri"] if named else None, tell=tell))
    if options.what and all(one.state == "busy" for one in found):
        raise InputError(str(found[0].reason))
    arrived, waiting = sync.summary(found)
    if options.json:
        print(json.dumps({"arrived": waiting == 0, "runs": [asdict(one) for one in found]}))
    else:
        _show(found, arrived)
    return FAILED if waiting else DONE


def _named(what: str, storage: str) -> list[Path]:
    """The spools of a folder, or of the run of that id. Raises InputError where there is none."""
    from onestage.tracking import sync

    folder = Path(what)
    if found := sync.spools(folder):
        return found
    if folder.is_dir():
        raise InputError(f"{what} holds nothing to sync: give the folder of a run, its spool, or a storage")
    every = _all(storage)
    if found := [spool for spool in every if spool.parent.name == what]:
        return found
    near = get_close_matches(what, {spool.parent.name for spool in every}, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "storage=… names another place"
    raise InputError(f"no run {what!r} with a spool under {storage}: {hint}")


def _all(storage: str) -> list[Path]:
    """Where the trainings of a storage have their spools; those at an address keep them on this machine."""
    from onestage.data import cache
    from onestage.data.store import is_address
    from onestage.tracking import sync

    if not is_address(storage):
        return sync.spools(Path(storage))
    return [*sync.spools(cache.folder(None) / "runs"), *sync.spools(Path("sweeps"))]


def _show(found: Sequence["Synced"], arrived: int) -> None:
    for one in found:
        held = f"{one.metrics} calls of metrics, {one.items} other items"
        if one.state == "arrived":
            print(f"{one.run_id}  arrived: {held}")
        elif one.state == "waits":
            print(plain(f"{one.run_id}  waits: {held}, in {one.folder}: {one.reason}"), file=sys.stderr)
        elif one.state == "busy":
            print(plain(f"{one.run_id}  passed over: {one.reason}"), file=sys.stderr)
    if not arrived and all(one.state == "nothing" for one in found):
        print(f"nothing waits, in {len(found)} runs" if found else "no run here has anything to send")
