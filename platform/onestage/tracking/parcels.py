"""Pictures, artifacts, models, params and tags that wait on disk, oldest first."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple


class Parcel(NamedTuple):
    """One thing to send: its kind and fields (see `onestage.tracking.delivery.Delivery.item`) and its files."""

    kind: str
    fields: dict[str, Any]
    payload: Path


class Parcels:
    """Folders ``00000001`` and on, each with ``item.json`` and ``payload/``; ``waiting`` holds their sizes in bytes.

    A folder appears under its number when it is whole. Those set aside by an earlier process wait again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob("*.part"):
            shutil.rmtree(draft)
        for aside in folder.glob("*.aside"):
            aside.rename(aside.with_suffix(""))
        self.waiting = {path: _size(path) for path in sorted(folder.iterdir())}
        self._last = int(max(self.waiting).name) if self.waiting else 0
        self._lock = Lock()

    def put(self, kind: str, fields: Mapping[str, Any], fill: Callable[[Path], object] | None = None) -> None:
        """Queue one; ``fill`` writes its files into the folder that it is given. Raises what ``fill`` raises."""
        with self._lock:
            self._last += 1
            place = self._folder / f"{self._last:08d}"
        draft = place.with_suffix(".part")
        try:
            (draft / "payload").mkdir(parents=True)
            if fill is not None:
                fill(draft / "payload")
            (draft / "item.json").write_text(json.dumps({"kind": kind, "fields": fields}))
            size = _size(draft)
            draft.rename(place)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self.waiting[place] = size

    def oldest(self) -> Path | None:
        """The place of the one to send next."""
        return min(list(self.waiting), default=None)

    def open(self, place: Path) -> Parcel:
        """What lies at a place."""
        item = json.loads((place / "item.json").read_text())
        return Parcel(item["kind"], item["fields"], place / "payload")

    def remove(self, place: Path) -> None:
        """Forget one that arrived."""
        draft = place.rename(place.with_suffix(".part"))
        del self.waiting[place]
        shutil.rmtree(draft)

    def set_aside(self, place: Path) -> None:
        """Keep one for a later process, out of the way of those behind it."""
        place.rename(place.with_suffix(".aside"))
        del self.waiting[place]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
