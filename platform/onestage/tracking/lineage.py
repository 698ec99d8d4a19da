"""Where a registered model comes from: from version to run to shards."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onestage.errors import InputError
from onestage.tracking import runs
from onestage.tracking.origin import COMMIT_TAG
from onestage.tracking.registry import Version

MANIFEST: Final = "dataset/dataset.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tar file, as the manifest of the training has it."""

    split: str
    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a version's run says; None for what it has not logged.

    ``dataset_hash`` is of the data that was trained on, ``root`` where it lay then, ``commit`` the code's.
    """

    run_id: str
    run_name: str
    experiment: str
    status: str
    commit: str | None
    dataset: str | None
    dataset_hash: str | None
    root: str | None
    shards: tuple[Shard, ...]


def lineage(uri: str, version: Version) -> Lineage | None:
    """None where the version has no run, or one that the store has no more."""
    if version.run_id is None:
        return None
    try:
        run = runs.find_run(uri, version.run_id)
    except InputError:
        return None
    return Lineage(
        run_id=run.run_id,
        run_name=run.name,
        experiment=run.experiment,
        status=run.status,
        commit=run.tags.get(COMMIT_TAG),
        dataset=run.tags.get("dataset.name"),
        dataset_hash=run.tags.get("dataset.hash"),
        root=run.params.get("data.root"),
        shards=_shards(uri, run.run_id),
    )


def _shards(uri: str, run_id: str) -> tuple[Shard, ...]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = runs.download(uri, run_id, MANIFEST, Path(folder))
        except InputError:
            return ()
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        Shard(
            split=split,
            name=one["name"],
            num_samples=one["samples"],
            num_bytes=one["bytes"],
            sha256=one["sha256"],
        )
        for split, held in manifest["splits"].items()
        for one in held["shards"]
    )
