"""The package that runs now, as a wheel for the nodes of a cluster."""

import base64
import hashlib
import importlib.metadata
import tomllib
import zipfile
from pathlib import Path
from typing import Final

from onestage.errors import InputError

MIB: Final = 2**20
LIMIT_BYTES: Final = 100 * MIB
"""Ray refuses a larger upload, when it has come through."""
PACKAGE: Final = Path(__file__).parents[1]
TIME: Final = (2020, 2, 2, 0, 0, 0)
"""Of every file in a wheel, as hatchling has it: the same content is the same bytes, and is uploaded once."""
NUM_NAMED: Final = 5
OF_THE_INSTALLER: Final = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_build.json", "uv_cache.json"}


def build(folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> Path:
    """Writes the wheel of the running onestage into ``folder``: the package, its yaml files and what pip needs.

    From a checkout it is built, from an installed wheel it is put together again; neither needs a network. Raises
    InputError over ``limit_bytes``, with the largest files.
    """
    root = _checkout()
    wheel = _repacked(folder) if root is None else _built(root, folder)
    if (size := wheel.stat().st_size) > limit_bytes:
        with zipfile.ZipFile(wheel) as archive:
            largest = sorted(archive.infolist(), key=lambda one: one.compress_size, reverse=True)[:NUM_NAMED]
        named = ", ".join(f"{one.filename} ({one.compress_size / MIB:.1f} MiB)" for one in largest)
        raise InputError(
            f"the wheel of onestage has {size / MIB:.1f} MiB, a cluster takes {limit_bytes / MIB:.1f}: move out of the "
            f"package what is large ({named}), or install it on the nodes and say cluster.ship=false"
        )
    return wheel


def unpacked(folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> list[Path]:
    """The same, unpacked in ``folder``; its packages' folders. Ray would install a wheel with its dependencies."""
    with zipfile.ZipFile(build(folder, limit_bytes=limit_bytes)) as archive:
        archive.extractall(folder / "unpacked")
    return sorted(path for path in (folder / "unpacked").iterdir() if path.suffix != ".dist-info")


def _checkout() -> Path | None:
    """The folder with the pyproject.toml that this package is built by, where it runs from its source."""
    for folder in PACKAGE.parents[1:3]:
        if (file := folder / "pyproject.toml").is_file():
            name = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}).get("name")
            return folder if name == PACKAGE.name else None
    return None


def _built(root: Path, folder: Path) -> Path:
    from hatchling.builders.wheel import WheelBuilder

    folder.mkdir(parents=True, exist_ok=True)
    [wheel] = WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    return Path(wheel)


def _repacked(folder: Path) -> Path:
    """A wheel of the files that an installed one's RECORD names."""
    try:
        installed = importlib.metadata.distribution(PACKAGE.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    files = {
        str(file): Path(str(file.locate()))
        for file in (installed.files if installed is not None else None) or []
        if file.parts[0] != ".." and "__pycache__" not in file.parts and file.name not in OF_THE_INSTALLER
    }
    if installed is None or PACKAGE / "__init__.py" not in {path.resolve() for path in files.values()}:
        raise InputError(
            f"onestage runs from {PACKAGE}, neither a checkout nor an installed wheel: install it, "
            f"or say cluster.ship=false where the nodes have it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{PACKAGE.name}-{installed.version}-py3-none-any.whl"
    record = f"{PACKAGE.name}-{installed.version}.dist-info/RECORD"
    lines = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            _add(archive, name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}\n")
        _add(archive, record, "".join([*lines, f"{record},,\n"]).encode())
    return wheel


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, TIME)
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
