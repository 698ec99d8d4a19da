"""A Hydra main that answers bad input in one line."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from onestage.config.compose import compose, first_lines
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

    with _command_line(name, arguments):
        main()  # answers --cfg, --info and the shell's completion by itself
    # Outside Hydra's main, which would print an error its own way and hold its global state while the task composes.
    return task(config) if accepted else 0


def multirun(name: str, overrides: Sequence[str], task: Callable[[dict[str, Any], int, Path], Any]) -> None:
    """Hydra's multirun of ``name``.yaml, by the sweeper that the config names.

    ``task`` gets each trial's plain config, its number and its folder, in the trial's process; what it returns is the
    sweeper's. Raises InputError for what Hydra or the sweeper refuse.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import env_override
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def main(_: DictConfig) -> Any:
        settings = HydraConfig.get()
        GlobalHydra.instance().clear()  # in the trial's own process, and composing needs it
        config = compose(name, list(settings.overrides.task))
        return task(config, settings.job.num, Path(settings.runtime.output_dir))

    # Hydra's main would print an error its own way, and exit.
    full = {"HYDRA_FULL_ERROR": "1"}
    try:
        with _command_line(name, ["--multirun", *overrides]), env_override(full):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(main)()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(first_lines(error)) from error


@contextmanager
def _command_line(name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Within this Hydra reads these arguments."""
    before = sys.argv
    sys.argv = [f"onestage {name}", *arguments]
    try:
        yield
    finally:
        sys.argv = before
