"""A queue on disk between a training, which never waits, and a tracking store, which may be slow, away or restarted.

What can't be sent stays on disk: the next spool on the folder sends it, or `sync` does. Each point arrives once.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Condition, Event, RLock, Thread
from typing import Any, Final

from onestage.errors import InputError
from onestage.tracking.delivery import POINTS_PER_CALL, Delivery, Point, Refused, RunDelivery
from onestage.tracking.journal import Journal
from onestage.tracking.parcels import Parcels
from onestage.tracking.redaction import redact, without_user

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
LONGEST_WAIT_S: Final = 30.0
BACKLOG_LIMIT_BYTES: Final = 8 * 1024**3
ATTEMPTS_PER_PARCEL: Final = 5


class Spool:
    """Queues points and parcels in ``folder``; a thread sends them about once a second, through ``delivery``.

    ``resumed`` says that the store may hold points that the folder knows nothing of (another host logged them): the
    store is asked, and points at or below its last step of a key are dropped. No method raises for a full disk or a
    store that is away; what is lost or late is said once, as a warning.
    """

    def __init__(self, *, delivery: Delivery, folder: Path, resumed: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._delivery = delivery
        self._lock_file = (folder / "lock").open("w")
        _lock(self._lock_file.fileno())
        self._journal = Journal(folder)
        self._parcels = Parcels(folder / "files")
        # The store's last steps; None: it may hold more than metrics.sent tells, so ask before sending.
        self._held = None if resumed or self._journal.sent < self._journal.written else dict[str, int]()
        self._attempts = 0
        self._away = False
        self._warned: set[str] = set()
        self._changed = Condition(RLock())
        self._wake = Event()
        self._flushing = 0
        self._closed = False
        self._thread = Thread(target=self._work, name="onestage-spool", daemon=True)
        self._thread.start()

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the points of one step: one file write. Those at or below their key's last step are dropped."""
        with self._changed:
            if self._accepts("metrics"):
                try:
                    self._journal.append(metrics, step)
                except (OSError, TypeError, ValueError) as error:
                    self._warn_once("metrics", "metrics are not kept: %s", error)

    def put(self, kind: str, fields: Mapping[str, Any], fill: Callable[[Path], object] | None = None) -> None:
        """Queue a parcel (`onestage.tracking.parcels.Parcels.put`); an error in ``fill`` is said as a warning."""
        if self._accepts(kind):
            try:
                self._parcels.put(kind, fields, fill)
            except Exception as error:
                self._warn_once(kind, "%s not kept: %s", kind, redact(f"{type(error).__name__}: {error}"))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued has arrived, at most so long; True when it has."""
        with self._changed:
            self._flushing += 1
            self._wake.set()
            arrived = self._changed.wait_for(self._is_empty, timeout_s)
            self._flushing -= 1
        return arrived

    def close(self, timeout_s: float) -> bool:
        """Flush, then stop; False when something stays on disk for the next spool or `sync`."""
        arrived = self._closed or self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._journal.close()
        self._wake.set()
        self._thread.join(POLL_S)
        self._lock_file.close()
        return arrived and self._is_empty()

    def _is_empty(self) -> bool:
        return self._journal.sent == self._journal.written and not self._parcels.waiting

    def _accepts(self, kind: str) -> bool:
        if self._closed:
            return False
        backlog = self._journal.written - self._journal.sent + sum(list(self._parcels.waiting.values()))
        if backlog < BACKLOG_LIMIT_BYTES:
            return True
        self._warn_once("full", "%s not kept: %d bytes wait for the tracking store already", kind, backlog)
        return False

    def _warn_once(self, topic: str, message: str, *values: object) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning(message, *values)

    def _work(self) -> None:
        wait_s = POLL_S
        while not self._closed:
            self._wake.wait(min(wait_s, POLL_S) if self._flushing else wait_s)
            self._wake.clear()
            try:
                self._send_all()
            except Exception as error:
                self._held = None
                wait_s = min(2 * wait_s, LONGEST_WAIT_S) if self._away else POLL_S
                if not self._away:
                    reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])
                    log.warning("the tracking store is away (training goes on, what it logs waits on disk): %s", reason)
                self._away = True
            else:
                wait_s, self._away = POLL_S, False
            with self._changed:
                self._changed.notify_all()

    def _send_all(self) -> None:
        while not self._closed and self._journal.sent < self._journal.written:
            points, end = self._journal.unsent()
            if self._held is None:
                self._held = self._delivery.latest_steps()
            held = self._held
            self._send_points([point for point in points if point.step > held.get(point.key, point.step - 1)])
            self._journal.mark_sent(end)
        while not self._closed and (place := self._parcels.oldest()):
            self._send_parcel(place)

    def _send_points(self, points: list[Point]) -> None:
        """Send in calls that the store allows; a point that it refuses is left out alone."""
        if not points:
            return
        if len(points) <= POINTS_PER_CALL:
            try:
                self._delivery.points(points)
                return
            except Refused as refusal:
                if len(points) == 1:
                    self._warn_once("points", "the store refuses %s: %s", points[0].key, refusal)
                    return
        half = (len(points) + 1) // 2
        self._send_points(points[:half])
        self._send_points(points[half:])

    def _send_parcel(self, place: Path) -> None:
        parcel = self._parcels.open(place)
        try:
            self._delivery.item(parcel.kind, parcel.fields, parcel.payload)
        except Refused as refusal:
            self._warn_once("refused", "the store refuses a %s: %s", parcel.kind, refusal)
            self._parcels.remove(place)
        except Exception:
            self._attempts += 1
            if self._attempts < ATTEMPTS_PER_PARCEL:
                raise
            self._delivery.latest_steps()  # Raises when the whole store is away: then nothing is wrong with this one.
            log.warning("%s %s is set aside: the store answers but does not take it", parcel.kind, place)
            self._parcels.set_aside(place)
            self._attempts = 0
        else:
            self._attempts = 0
            self._parcels.remove(place)


def open_spool(*, uri: str, run_id: str, folder: Path, resumed: bool = False) -> Spool:
    """A spool for an MLflow run, whose folder remembers it for `sync`. Raises InputError for another run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "run.json"
    if target.exists() and (other := json.loads(target.read_text())["run_id"]) != run_id:
        raise InputError(f"{folder} holds what run {other} logged, not {run_id}: give each run its own folder")
    target.write_text(json.dumps({"uri": without_user(uri), "run_id": run_id}))
    return Spool(delivery=RunDelivery(uri=uri, run_id=run_id), folder=folder, resumed=resumed)


def sync(folder: Path, *, uri: str | None = None, timeout_s: float = 300.0) -> bool:
    """Send what a training left in its folder; True when everything arrived.

    ``uri`` replaces the tracking URI that the training used, whose password is not kept on disk. Raises InputError
    when the folder is no spool, or a training still writes to it.
    """
    target = folder / "run.json"
    if not target.exists():
        raise InputError(f"{folder} holds nothing to sync: give the tracking folder of a run (it has a run.json)")
    with (folder / "lock").open("w") as probe:
        if not _lock(probe.fileno()):
            raise InputError(f"a training still logs through {folder}: it sends by itself, or stop it first")
    remembered = json.loads(target.read_text())
    spool = open_spool(uri=uri or remembered["uri"], run_id=remembered["run_id"], folder=folder)
    return spool.close(timeout_s)


def _lock(descriptor: int) -> bool:
    """Take the folder for this process; False when another has it. A file system without locks lets all pass."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
