"""A queue on disk between a training, which never waits, and a tracking store, which may be slow, away or restarted.

What can't be sent stays on disk: the next spool on the folder sends it, or `onestage sync`. Each point arrives once.
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

POLL_S: Final = 5.0
LONGEST_WAIT_S: Final = 30.0
END_S: Final = 1.0
BACKLOG_LIMIT_BYTES: Final = 8 * 1024**3
ATTEMPTS_PER_PARCEL: Final = 5
SPOOL_FOLDER: Final = "spool"
"""Of a run's folder, what holds its spool."""
TARGET: Final = "run.json"
"""In a spool's folder: whose run it holds."""


class Spool:
    """Queues points and parcels in ``folder``; a thread sends them every few seconds, through ``delivery``.

    What is logged at every step is sent as one point in ``every_s`` seconds (0: each step); the folder keeps all.
    ``resumed`` says that the store may hold points that the folder knows nothing of (another host logged them): the
    store is asked, and points at or below its last step of a key are dropped. No method raises for a full disk or a
    store that is away; what is lost or late is said once, as a warning.
    """

    def __init__(self, *, delivery: Delivery, folder: Path, resumed: bool = False, every_s: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._delivery = delivery
        self._every_s = every_s
        self._lock_file = (folder / "lock").open("w")
        _lock(self._lock_file.fileno())
        self._journal = Journal(folder)
        self._parcels = Parcels(folder / "files")
        # The store's last steps; None: it may hold more than metrics.sent tells, so ask before sending.
        self._held = None if resumed or self._journal.sent < self._journal.written else dict[str, int]()
        self._attempts = 0
        self.trouble: str | None = None
        """What the store's last answer, or its silence, was, where nothing was sent since."""
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
        self._thread.join(END_S)
        self._lock_file.close()
        return arrived and self._is_empty()

    def backlog(self) -> int:
        """The bytes that wait."""
        return self._journal.written - self._journal.sent + sum(list(self._parcels.waiting.values()))

    def _is_empty(self) -> bool:
        return self._journal.sent == self._journal.written and not self._parcels.waiting

    def _accepts(self, kind: str) -> bool:
        if self._closed:
            return False
        backlog = self.backlog()
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
                wait_s = min(2 * wait_s, LONGEST_WAIT_S) if self.trouble else POLL_S
                reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])
                if not self.trouble:
                    log.warning("the tracking store is away (training goes on, what it logs waits on disk): %s", reason)
                self.trouble = reason
            else:
                wait_s, self.trouble = POLL_S, None
            with self._changed:
                self._changed.notify_all()

    def _send_all(self) -> None:
        while not self._closed and self._journal.sent < self._journal.written:
            if self._held is None:
                self._held = self._delivery.latest_steps()
            points, end = self._journal.unsent(held=self._held, every_s=self._every_s, last=self._flushing > 0)
            if end == self._journal.sent:  # the steps of this moment, which wait for their window's end
                break
            self._send_points(points)
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


def open_spool(*, uri: str, run_id: str, folder: Path, resumed: bool = False, every_s: float = 0.0) -> Spool:
    """A spool for an MLflow run, whose folder remembers it for `onestage.tracking.sync`, without its password.

    Raises InputError for another run's folder.
    """
    remember(folder, uri=uri, run_id=run_id, every_s=every_s)
    delivery = RunDelivery(uri=uri, run_id=run_id)
    return Spool(delivery=delivery, folder=folder, resumed=resumed, every_s=every_s)


def remember(folder: Path, *, uri: str, run_id: str, every_s: float | None = None) -> None:
    """Notes in the folder whose run it holds. Raises InputError for another run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TARGET
    before = json.loads(file.read_text()) if file.exists() else {"run_id": run_id, "every_s": 0.0}
    if (other := before["run_id"]) != run_id:
        raise InputError(f"{folder} holds what run {other} logged, not {run_id}: give each run its own folder")
    rate = before.get("every_s", 0.0) if every_s is None else every_s
    file.write_text(json.dumps({"uri": without_user(uri), "run_id": run_id, "every_s": rate}))


def in_use(folder: Path) -> bool:
    """Whether a process on this host logs through the folder."""
    with (folder / "lock").open("w") as probe:
        return not _lock(probe.fileno())


def _lock(descriptor: int) -> bool:
    """Take the folder for this process; False when another has it. A file system without locks lets all pass."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
