"""``onestage data``: labelled images in and out, and what is in them."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from onestage.cli import check
from onestage.cli.terminal import FORMATS, names, plain, steps, writing
from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.data.formats.record import Finding

NUM_EXAMPLES: Final = 3
"""Findings of each kind that are told; --findings writes them all."""
MAX_FINDINGS_IN_JSON: Final = 10_000


def add(verbs: Any) -> None:
    """The verb's parsers, for the command line."""
    data = verbs.add_parser("data", help="bring labelled images in and out, and look at them").add_subparsers(
        metavar="VERB", required=True
    )
    bring = data.add_parser("import", help="labelled images to WebDataset shards and a manifest")
    bring.add_argument("format", choices=FORMATS, help="how SOURCE is labelled")
    bring.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with images and labels (coco, yolo: or its json or yaml)",
    )
    bring.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    bring.add_argument(
        "--classes", type=names, metavar="A,B,…", help="these only, in this order (default: all of the set)"
    )
    bring.add_argument("--val", type=float, default=0.0, help="share for validation, of a set without splits")
    bring.add_argument("--test", type=float, default=0.0, help="share for the test, of a set without splits")
    bring.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    bring.add_argument("--name", help="of the dataset (default: the folder's)")
    bring.add_argument("--findings", type=Path, metavar="FILE", help="write all findings there, one a line")
    bring.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    bring.add_argument("--json", action="store_true", help="one JSON object on stdout")
    bring.set_defaults(run=_import)
    send = data.add_parser("export", help="a dataset folder to images and labels")
    send.add_argument("root", metavar="DIR", help="dataset folder, or its address")
    send.add_argument("--format", choices=FORMATS, required=True, help="how to label the images")
    send.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    send.add_argument("--json", action="store_true", help="one JSON object on stdout")
    send.set_defaults(run=_export)
    check.add(data)


def _import(options: argparse.Namespace) -> int:
    from onestage.data.clean import clean
    from onestage.data.contents import READERS
    from onestage.data.pack import pack
    from onestage.data.splitting import split

    with steps() as step:
        step("reading annotations")
        labelled = READERS[options.format](options.source, classes=options.classes, name=options.name)
        source = clean(labelled, progress=step("looking at images"))
        if not source.classes:
            raise InputError(f"{options.source} has no box, and so no class: annotate it, or say --classes")
        if options.val or options.test:
            shared_out = step("sharing out images")
            source = split(source, val=options.val, test=options.test, seed=options.seed, progress=shared_out)
        manifest = pack(source, options.out, overwrite=options.overwrite, progress=step("packing"))
    _tell(source.findings)
    if options.findings is not None:
        lines = (f"{plain(f.kind)}\t{plain(f.where)}\t{plain(f.what)}\n" for f in source.findings)
        with writing(options.findings):
            options.findings.parent.mkdir(parents=True, exist_ok=True)
            options.findings.write_text("".join(lines), encoding="utf-8")
    boxes = {name: sum(len(record.labels) for record in records) for name, records in source.splits.items()}
    splits = {name: {"images": manifest.split(name).num_samples, "boxes": boxes[name]} for name in boxes}
    if options.json:
        findings = [{"kind": f.kind, "where": f.where, "what": f.what} for f in source.findings]
        print(
            json.dumps(
                {
                    "out": str(options.out),
                    "name": manifest.name,
                    "classes": list(manifest.classes),
                    "content_hash": manifest.content_hash,
                    "splits": splits,
                    "finding_counts": {kind: len(those) for kind, those in _by_kind(source.findings).items()},
                    "findings": findings[:MAX_FINDINGS_IN_JSON],
                }
            )
        )
        return DONE
    print(f"{options.out}: {len(manifest.classes)} classes ({plain(', '.join(manifest.classes))})")
    _print_splits(splits)
    if source.findings:
        print(f"  {len(source.findings):,} findings, told above")
    return DONE


def _export(options: argparse.Namespace) -> int:
    from onestage.data.unpack import export

    with writing(options.out), steps() as step:
        exported = export(options.root, options.format, options.out, progress=step("writing"))
    for sentence in exported.lost:
        print(f"{options.format} does not keep all: {sentence}", file=sys.stderr)
    splits = {name: {"images": images, "boxes": boxes} for name, (images, boxes) in exported.splits.items()}
    if options.json:
        print(json.dumps({"out": str(options.out), "format": options.format, "splits": splits, "lost": exported.lost}))
        return DONE
    print(f"{options.out}: {options.format}")
    _print_splits(splits)
    return DONE


def _print_splits(splits: dict[str, dict[str, int]]) -> None:
    for name, counts in splits.items():
        print(f"  {name:6} {counts['images']:7,} images {counts['boxes']:8,} boxes")


def _by_kind(findings: "list[Finding]") -> "dict[str, list[Finding]]":
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    return kinds


def _tell(findings: "list[Finding]") -> None:
    """Each kind with what is done about it and a few examples, on stderr."""
    from onestage.data.formats.findings import REMEDY

    for kind, those in _by_kind(findings).items():
        print(f"{len(those):,} x {kind}: {REMEDY[kind]}", file=sys.stderr)
        for one in those[:NUM_EXAMPLES]:
            print(f"    {plain(one.where)}: {plain(one.what)}", file=sys.stderr)
        if len(those) > NUM_EXAMPLES:
            print(f"    and {len(those) - NUM_EXAMPLES:,} more", file=sys.stderr)
