"""From Hydra's yaml to a plain dict, and from a plain dict to objects. The only room that knows Hydra."""

from onestage.config.build import build
from onestage.config.compose import compose, merged, quoted
from onestage.config.folder import CONF, options

__all__ = ["CONF", "build", "compose", "merged", "options", "quoted"]
