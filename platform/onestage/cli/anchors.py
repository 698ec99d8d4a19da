"""``onestage anchors``: the priors that fit a dataset."""

from typing import Any


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
