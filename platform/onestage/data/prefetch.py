"""Shards from elsewhere, fetched before they are asked for."""

import time
import weakref
from collections.abc import Sequence
from threading import Thread
from typing import Final

from onestage.data.manifest import Shard
from onestage.data.order import WINDOW_SHARDS
from onestage.data.store import Store

AHEAD_SHARDS: Final = WINDOW_SHARDS
"""A whole window: its first two batches ask for all of its shards."""
_POLL_S: Final = 0.1


class Prefetch:
    """Fetches ``shards`` in their order, a window ahead of the ``reader``, in a thread that ends with it.

    It takes no more than half of the cache. Other processes that read the same shards share the work: what one of them
    fetches just now is passed over. Errors are left to the reader, who meets them. No lock is shared with the thread,
    so that a fork can't inherit one that is held.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], *, reader: object) -> None:
        self._store = store
        self._shards = list(shards)
        self._places = {shard.name: place for place, shard in enumerate(self._shards)}
        self._reached = -1
        self._stopped = False
        # To be called to fetch no further shard. Whoever comes first does; then nothing keeps this alive any more.
        self.stop = weakref.finalize(reader, self._stop)
        Thread(target=self._work, name="onestage-prefetch", daemon=True).start()

    def reached(self, shard: Shard) -> None:
        """The reader is at this shard."""
        self._reached = max(self._reached, self._places.get(shard.name, -1))

    def _stop(self) -> None:
        self._stopped = True

    def _work(self) -> None:
        for place, shard in enumerate(self._shards):
            while not self._stopped and not self._is_due(place):
                time.sleep(_POLL_S)
            if self._stopped:
                return
            if place > self._reached:
                self._store.fetch_ahead(shard)

    def _is_due(self, place: int) -> bool:
        first = self._reached + 1
        num_bytes = sum(shard.num_bytes for shard in self._shards[first : place + 1])
        return place < first + AHEAD_SHARDS and num_bytes <= self._store.settings.cache_bytes // 2
