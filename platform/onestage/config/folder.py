"""Where the yaml files are, found without importing Hydra."""

from pathlib import Path
from typing import Final

_PACKAGED = Path(__file__).parent.parent / "conf"
CONF: Final = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"
"""Inside an installed package, or at the root of a checkout."""


def options(group: str) -> list[str]:
    """The choices of a config group, such as ``detector``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
