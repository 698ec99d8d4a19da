"""A Hydra main that answers bad input in one line."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from onestage.config.compose import compose
from onestage.config.folder import CONF
from onestage.errors import InputError

TAKE_A_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd", "--config-name", "-cn")


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments that are neither Hydra's flags nor their values. Raises InputError for one without a value."""
    overrides = []
    for before, one in zip(["", *arguments], arguments, strict=False):
        if one.startswith("-") or before in TAKE_A_VALUE:
            continue
        if "=" not in one and not one.startswith("~"):
            raise InputError(f"{one!r} is no override: write KEY=VALUE, as trainer.max_epochs=10")
        overrides.append(one)
    return overrides


def run(name: str, arguments: Sequence[str], task: Callable[[dict[str, Any]], int]) -> int:
    """Hydra's command line (overrides, ``--cfg job``, …) over ``name``.yaml; ``task`` gets the plain config.

    Returns the task's exit code. Raises InputError for overrides that do not compose.
    """
    config = compose(name, _overrides(arguments))  # refuses in one line what Hydra would in many
    accepted: list[bool] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(_: DictConfig) -> None:
        accepted.append(True)

    before = sys.argv
    sys.argv = [f"onestage {name}", *arguments]
    try:
        main()  # answers --cfg, --info and the shell's completion by itself
    finally:
        sys.argv = before
    # Outside Hydra's main, which would print an error its own way and hold its global state while the task composes.
    return task(config) if accepted else 0
