"""``onestage data``: labelled images in and out, and what is in them."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from onestage.cli import check
from onestage.errors import DONE


def add(verbs: Any) -> None:
    """The verb's parsers, for the command line."""
    data = verbs.add_parser("data", help="bring labelled images in").add_subparsers(metavar="VERB", required=True)
    bring = data.add_parser("import", help="labelled images to WebDataset shards and a manifest")
    bring.add_argument("format", choices=["voc"], help="how SOURCE is labelled")
    bring.add_argument("source", type=Path, metavar="SOURCE", help="folder with the images and labels")
    bring.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    bring.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    bring.add_argument("--json", action="store_true", help="one JSON object on stdout")
    bring.set_defaults(run=_import)
    check.add(data)


def _import(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from onestage.data.formats import voc
    from onestage.data.pack import pack

    source = voc.read(options.source)
    for finding in source.findings:
        print(f"{finding.kind}: {finding.where}: {finding.what}", file=sys.stderr)
    num_samples = sum(len(records) for records in source.splits.values())
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing", total=num_samples)
        manifest = pack(
            source, options.out, overwrite=options.overwrite, progress=lambda done, _: bar.update(task, completed=done)
        )
    boxes = {name: sum(len(record.labels) for record in records) for name, records in source.splits.items()}
    if options.json:
        print(
            json.dumps(
                {
                    "out": str(options.out),
                    "classes": list(manifest.classes),
                    "content_hash": manifest.content_hash,
                    "splits": {
                        name: {"images": manifest.split(name).num_samples, "boxes": boxes[name]} for name in boxes
                    },
                    "findings": [{"kind": f.kind, "where": f.where, "what": f.what} for f in source.findings],
                }
            )
        )
        return DONE
    print(f"{options.out}: {len(manifest.classes)} classes ({', '.join(manifest.classes)})")
    for name, count in boxes.items():
        print(f"  {name:6} {manifest.split(name).num_samples:7,} images {count:8,} boxes")
    if source.findings:
        print(f"  {len(source.findings)} findings, listed above")
    return DONE
