"""Whether the driver of a run is still alive: the sign of life that it leaves in the store, and what to make of it.

A driver on this host is dead when its process is gone. One on another host is dead when its last sign of life is
older than ``SILENT_S``, by the clock of the tracking server; a store without a server has none, and there each host's
own clock counts. A driver that was thought to be dead sets its run to RUNNING again with its next sign of life.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from onestage.tracking.client import REACH_TIMEOUT_S, client, is_server
from onestage.tracking.origin import HOST_TAG, is_alive, is_here, process_tags
from onestage.tracking.redaction import without_user

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEARTBEAT_TAG: Final = "onestage.heartbeat"
REASON_TAG: Final = "onestage.reason"
EVERY_S: Final = 60.0
SILENT_S: Final = 600.0
GONE: Final = "its process ended without a word"
SILENT: Final = "no sign of life from its driver"

_ahead_s: dict[str, float] = {}  # of this host's clock, the server's at an address


def store_time(uri: str) -> float:
    """Seconds since 1970 by the store's clock: its server's, where it is one that ever answered, else this host's."""
    if is_server(uri):
        with suppress(OSError, ValueError, TypeError):
            _ahead_s[uri] = _server_time(uri) - time.time()
    return time.time() + _ahead_s.get(uri, 0.0)


def _server_time(uri: str) -> float:
    request = Request(without_user(uri).rstrip("/") + "/health", headers={"Cache-Control": "no-cache"})
    try:
        with urlopen(request, timeout=REACH_TIMEOUT_S) as answer:
            date = answer.headers["Date"]
    except HTTPError as error:  # it does not let us in, and has a clock all the same
        date = error.headers["Date"]
    return parsedate_to_datetime(date).timestamp()


def life_tags(uri: str) -> dict[str, str]:
    """This process as a run's driver, alive now."""
    return process_tags() | {HEARTBEAT_TAG: f"{store_time(uri):.0f}"}


def last_beat(tags: Mapping[str, str]) -> float | None:
    """When the driver last showed life, in seconds since 1970; None where that is not known."""
    with suppress(KeyError, ValueError):
        return float(tags[HEARTBEAT_TAG])
    return None


def dead_because(tags: Mapping[str, str], now: Callable[[], float]) -> str | None:
    """Why the driver of a RUNNING run with these tags is dead; None where it lives, or nothing is known.

    >>> dead_because({"onestage.host": "far", "onestage.heartbeat": "1000"}, lambda: 1660.0)
    'no sign of life from its driver on far for 11 minutes'
    >>> dead_because({"onestage.host": "far", "onestage.heartbeat": "1000"}, lambda: 1500.0)
    """
    if is_here(tags):
        return None if is_alive(tags) else GONE
    beat = last_beat(tags)
    if beat is None or (silent_s := now() - beat) <= SILENT_S:
        return None
    return f"{SILENT} on {where(tags)} for {silent_s / 60:.0f} minutes"


def where(tags: Mapping[str, str]) -> str:
    """The host of a run's driver."""
    return tags.get(HOST_TAG, "another host")


def is_presumed(tags: Mapping[str, str]) -> bool:
    """Whether a run was ended because its driver seemed dead, rather than by the driver."""
    return tags.get(REASON_TAG, "").startswith((GONE, SILENT))


@contextmanager
def beating(uri: str | None, run_id: str | None) -> Iterator[None]:
    """Within this a thread shows once a minute that this process, the run's driver, is alive; its failures are silent.

    What was not told when the run was opened again, since the store was away, is told with the first sign of life.
    """
    if uri is None or run_id is None:
        yield
        return
    heart = _Heart(uri, run_id)
    heart.start()
    try:
        yield
    finally:
        heart.over.set()
        heart.join(timeout=1.0)  # one that waits for a store is left to itself


class _Heart(threading.Thread):
    def __init__(self, uri: str, run_id: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.uri = uri
        self.run_id = run_id
        self.over = threading.Event()
        self.known = False  # that the run is this process's

    def run(self) -> None:
        while not self.over.is_set():
            with suppress(Exception):
                self._beat(client(self.uri))
            self.over.wait(EVERY_S)

    def _beat(self, store: "MlflowClient") -> None:
        from mlflow.entities import RunTag

        run = store.get_run(self.run_id)
        tags = run.data.tags
        mine = all(tags.get(key) == value for key, value in process_tags().items())
        if self.known and not mine:  # somebody goes on with the run
            self.over.set()
        if self.over.is_set():
            return
        store.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in life_tags(self.uri).items()])
        if run.info.status != "RUNNING" and (is_presumed(tags) or not self.known) and not self.over.is_set():
            if REASON_TAG in tags:
                store.delete_tag(self.run_id, REASON_TAG)
            store.update_run(self.run_id, status="RUNNING")
        self.known = True
