"""A Hydra main that answers bad input in one line."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from onestage.config.compose import compose
from onestage.config.folder import CONF


def run(name: str, arguments: Sequence[str], task: Callable[[dict[str, Any]], int]) -> int:
    """Hydra's command line (overrides, ``--cfg job``, …) over ``name``.yaml; ``task`` gets the plain config.

    Returns the task's exit code. Raises InputError for overrides that do not compose.
    """
    overrides = [one for one in arguments if not one.startswith("-") and "=" in one]
    config = compose(name, overrides)  # refuses in one line what Hydra would in many
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
