"""The files of a run's checkpoints: ``last.ckpt``, ``best.ckpt``, and those before the last as ``last-STEP.ckpt``."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

LAST: Final = "last.ckpt"
BEST: Final = "best.ckpt"
_KEPT: Final = re.compile(r"last-(\d+)\.ckpt")

Say = Callable[[str], None]


def kept_name(step: int) -> str:
    """How the checkpoint of ``step`` is called when there is a newer one."""
    return f"last-{step}.ckpt"


def kept_steps(names: list[str]) -> list[int]:
    """The steps of the checkpoints before the last among ``names``, newest first.

    >>> kept_steps(["last.ckpt", "last-8.ckpt", "best.ckpt", "last-16.ckpt"])
    [16, 8]
    """
    return sorted((int(match[1]) for name in names if (match := _KEPT.fullmatch(name))), reverse=True)


def by_age(names: list[str]) -> list[str]:
    """The checkpoints to go on from among ``names``, newest first."""
    return [LAST for name in names if name == LAST] + [kept_name(step) for step in kept_steps(names)]


def newest(folder: Path, say: Say) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole; ``say`` gets a line for each newer one that is not."""
    for name in by_age(names_in(folder)):
        if (why := damage(folder / name)) is None:
            return folder / name
        say(f"checkpoint {folder / name} is damaged ({why}): passed over")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the CRC-32 of each of its records; None where it is whole.

    torch.save stores these sums, but torch.load does not look at them.
    """
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
            if not any(name.endswith("/data.pkl") for name in records.namelist()):
                return "it is no checkpoint"
    except OSError as error:
        return error.strerror or type(error).__name__
    except Exception as error:  # a damaged directory makes zipfile raise nearly anything
        return f"it can't be read as a zip file: {error}"
    return None if broken is None else f"the checksum of its record {broken} differs"


def step_of(path: Path) -> int:
    """The step of a whole checkpoint."""
    import torch  # whoever starts a training looks at its files, and waits for no library that only workers need

    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def names_in(folder: Path) -> list[str]:
    """The names of all files in ``folder``; none where there is no such folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
