"""``onestage models``: registered models, which of their versions is the champion, and how it came to be."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onestage.cli.terminal import age, plain, take
from onestage.errors import DONE, FAILED, InputError

if TYPE_CHECKING:
    from onestage.promotion import Promotion
    from onestage.tracking.lineage import Lineage
    from onestage.tracking.registry import Version

OVERRIDES = {"nargs": "*", "metavar": "KEY=VALUE"}


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    models = verbs.add_parser("models", help="registered models: which version is the champion, and the one before")
    actions = models.add_subparsers(title="actions", metavar="ACTION", required=True)

    listed = actions.add_parser("list", help="models, their versions, aliases and scores")
    listed.add_argument("name", nargs="?", metavar="NAME", help="only this model's")
    listed.add_argument("overrides", **OVERRIDES, help="tracking.uri=…")
    listed.set_defaults(run=_list)

    shown = actions.add_parser("show", help="where a version comes from: its run, its dataset, its shards")
    shown.add_argument("version", metavar="NAME/VERSION", help="or NAME@champion")
    shown.add_argument("overrides", **OVERRIDES, help="tracking.uri=…")
    shown.set_defaults(run=_show)

    promoted = actions.add_parser(
        "promote",
        help="make a run's model, or a version, the champion",
        description="Exit code 1 where the gate refuses: the alias stays, and nothing is registered.",
    )
    promoted.add_argument("target", metavar="RUN", help="MLflow run id, or models:/NAME/VERSION")
    promoted.add_argument("overrides", **OVERRIDES, help="split=test (the default), data.root=…, tracking.uri=…")
    promoted.add_argument("--name", help="the registered model's name (default: the dataset's)")
    promoted.add_argument("--alias", default="champion", help="champion (the default), challenger or any other word")
    promoted.add_argument("--force", action="store_true", help="also with a lower mAP, or measured on other data")
    promoted.set_defaults(run=_promote)

    back = actions.add_parser("rollback", help="give the alias back to the version that had it before")
    back.add_argument("name", metavar="NAME", help="the registered model")
    back.add_argument("overrides", **OVERRIDES, help="tracking.uri=…")
    back.add_argument("--alias", default="champion", help="champion (the default), or another")
    back.set_defaults(run=_rollback)

    for one in (listed, shown, promoted, back):
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _store(overrides: Sequence[str]) -> str:
    from onestage.config import compose
    from onestage.tracking.client import check
    from onestage.tracking.tracker import store_uri

    uri = store_uri(compose("train", list(overrides)))
    if uri is None:
        raise InputError("tracking=none keeps no models")
    check(uri)
    return uri


def _list(options: argparse.Namespace) -> int:
    from onestage.tracking.lineage import lineage
    from onestage.tracking.registry import versions

    if "=" in (options.name or ""):  # none was named
        options.overrides.insert(0, options.name)
        options.name = None
    uri = _store(options.overrides)
    found = versions(uri, options.name)
    if options.json:
        print(json.dumps({"versions": [{**_told(one), "lineage": _plain(lineage(uri, one))} for one in found]}))
    elif found:
        _table(found)
    else:
        print("no model is registered: `onestage models promote RUN` makes the first", file=sys.stderr)
    return DONE


def _show(options: argparse.Namespace) -> int:
    from onestage.tracking.lineage import lineage
    from onestage.tracking.registry import find

    uri = _store(options.overrides)
    version = find(uri, options.version)
    come_from = lineage(uri, version)
    if options.json:
        print(json.dumps({**_told(version), "lineage": _plain(come_from)}))
    else:
        _print(version, come_from)
    return DONE


def _promote(options: argparse.Namespace) -> int:
    from onestage.promotion import promote

    split, overrides = take("split", options.overrides)
    made = promote(
        options.target,
        uri=_store(overrides),
        name=options.name,
        alias=options.alias,
        split=split,
        overrides=overrides,
        force=options.force,
    )
    if made.refused is not None:
        print(f"onestage: not promoted: {made.refused}; --force promotes it all the same", file=sys.stderr)
    if options.json:
        print(json.dumps({**asdict(made), "moved": made.moved}))
    elif made.refused is None:
        print(_said(made))
    return DONE if made.refused is None else FAILED


def _said(made: "Promotion") -> str:
    it = f"models:/{made.name}@{made.alias}"
    measured = "" if made.score is None else f", {made.score}"
    if not made.moved:
        return f"{it} is version {made.version} already{measured}"
    if made.former is None:
        return f"{it} is now version {made.version}{measured}"
    before = "" if made.former_score is None else f" ({made.former_score})"
    return f"{it} is now version {made.version}{measured}; before it was version {made.former}{before}"


def _rollback(options: argparse.Namespace) -> int:
    from onestage.tracking.registry import take_back

    before, now = take_back(_store(options.overrides), options.name, options.alias)
    if options.json:
        told = {"name": now.name, "alias": options.alias, "version": now.version, "former": before.version}
        print(json.dumps({**told, "run_id": now.run_id}))
    else:
        print(f"models:/{now.name}@{options.alias} is version {now.version} again, no more version {before.version}")
    return DONE


def _table(found: "Sequence[Version]") -> None:
    from rich.console import Console
    from rich.table import Table

    from onestage.promotion import SHORT, Score

    table = Table(box=None, header_style="bold")
    for name in ("model", "version", "aliases", "score", "dataset", "run", "age"):
        table.add_column(name, no_wrap=name != "aliases", justify="right" if name in ("version", "age") else "left")
    for one in found:
        score = Score.of_tags(one.tags)
        table.add_row(
            one.name,
            one.version,
            ", ".join(one.aliases),
            "" if score is None else str(score),
            "" if score is None else score.dataset_hash[:SHORT],
            (one.run_id or "")[:8],
            age(time.time() - one.created),
        )
    Console().print(table)


def _print(version: "Version", come_from: "Lineage | None") -> None:
    from onestage.promotion import Score

    score = Score.of_tags(version.tags)
    rows = [("version", version.uri), ("aliases", ", ".join(version.aliases) or "none")]
    if score is not None:
        rows += [("score", f"{score}, measured on dataset {score.dataset_hash}")]
    if come_from is None:
        rows += [("run", f"{version.run_id}, which the store has no more" if version.run_id else "none")]
    else:
        rows += [("run", f"{come_from.run_id}, {come_from.run_name} in {come_from.experiment}, {come_from.status}")]
        rows += [("commit", come_from.commit)] if come_from.commit else []
        rows += [("dataset", f"{come_from.dataset}, {come_from.dataset_hash}")] if come_from.dataset_hash else []
        rows += [("root", come_from.root)] if come_from.root else []
        rows += [
            ("shard", f"{one.split}: {one.name}, {one.num_samples:,} images, {one.num_bytes:,} bytes, {one.sha256}")
            for one in come_from.shards
        ]
    for name, value in rows:
        print(f"{name:8} {plain(value)}")


def _told(one: "Version") -> dict[str, Any]:
    from onestage.promotion import Score

    score = Score.of_tags(one.tags)
    return {
        "name": one.name,
        "version": one.version,
        "aliases": list(one.aliases),
        "score": None if score is None else asdict(score),
        "run_id": one.run_id,
        "created": one.created,
    }


def _plain(come_from: "Lineage | None") -> dict[str, Any] | None:
    return None if come_from is None else asdict(come_from)
