"""The search space of a sweep, as the sweeper will read it, before anything starts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onestage.config.compose import first_lines
from onestage.config.folder import CONF
from onestage.errors import InputError

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._space import Space


def fixed(overrides: Sequence[str]) -> list[str]:
    """Those that give one value, for all trials. Raises InputError for what is no override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(first_lines(error)) from error
    return [text for text, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]


def space_of(name: str, overrides: Sequence[str]) -> "Space":
    """What the overrides and ``sweep.search_space`` span. Raises InputError for what spans nothing."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from hydra_plugins.ray_tune_sweeper._space import parse
    from onestage.config.schema import register

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            base = loader.load_configuration(name, fixed(overrides), run_mode=RunMode.MULTIRUN)
            search_space: Any = OmegaConf.to_container(base.sweep.search_space, resolve=True)
            choices = base.hydra.runtime.choices
            return parse(
                list(overrides),
                search_space,
                seed=base.seed,
                parser=OverridesParser.create(config_loader=loader),
                present=lambda key: choices[key] if key in choices else OmegaConf.select(base, key),
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(first_lines(error)) from error
