"""``onestage data check`` and ``inspect``: what is wrong with a dataset, and what is in it."""

from typing import Any


def add(verbs: Any) -> None:
    """The parsers of check and inspect, among the verbs of ``onestage data``."""
