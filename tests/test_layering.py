"""Who may import whom. Read the table from below: a room builds on those that it names, never on those above it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "platform" / "onestage"
PLUGINS = PACKAGE.parent / "hydra_plugins"


class Room(NamedTuple):
    """What a room imports, by name; ``lazily`` rooms only inside functions, when they are needed."""

    rooms: str = ""
    libraries: str = ""
    lazily: str = ""


# From the command line down to the plain values. The standard library is free to all.
ROOMS = {
    "cli": Room(
        "errors",
        "rich",
        lazily="bench cluster config data evaluation export fitting promotion quickstart replay sweeps tracking",
    ),
    "quickstart": Room("errors", "rich", lazily="cluster config data evaluation tracking"),
    "bench": Room(
        "cluster config data errors sweeps tracking training types",
        "PIL cv2 hydra_plugins numpy psutil pytorch_lightning rich simplejpeg torch torchvision webdataset",
        lazily="evaluation",
    ),
    "sweeps": Room(
        "cluster config data errors promotion tracking training",
        "filelock hydra_plugins matplotlib numpy optuna ray rich",
        lazily="evaluation metrics",
    ),
    "promotion": Room("errors tracking", lazily="evaluation"),
    "export": Room("config errors inference weights", lazily="tracking"),
    "replay": Room("config training types", "torch"),
    "cluster": Room(
        "config data errors metrics tracking training types",
        "filelock fsspec hatchling psutil pyarrow pytorch_lightning ray rich safetensors torch torchvision",
        lazily="evaluation fitting",
    ),
    "evaluation": Room(
        "config data drawing errors inference metrics training types",
        "cv2 matplotlib numpy rich torch",
        lazily="tracking",
    ),
    "tracking": Room("errors types", "PIL cv2 mlflow numpy pandas psutil psycopg", lazily="inference"),
    "inference": Room(
        "boxes config data detectors errors training types", "numpy safetensors torch", lazily="tracking"
    ),
    "fitting": Room("anchors config data errors", "matplotlib rich torch yaml"),
    "config": Room("errors", "hydra hydra_plugins omegaconf"),
    "training": Room("drawing errors types", "numpy pytorch_lightning safetensors torch"),
    "data": Room(
        "drawing errors types",
        "PIL aiohttp cv2 filelock fsspec matplotlib numpy pytorch_lightning simplejpeg sklearn tenacity torch "
        "torchvision webdataset yaml",
    ),
    "metrics": Room("errors types", "numpy torch torchmetrics"),
    "detectors": Room("anchors assign boxes errors losses nn types", "numpy torch torchvision", lazily="weights"),
    "weights": Room("errors types", "numpy safetensors torch torchvision"),
    "nn": Room("anchors boxes errors types", "numpy torch torchvision"),
    "losses": Room("boxes errors types", "numpy torch torchvision"),
    "assign": Room("anchors boxes errors types", "numpy torch torchvision"),
    "anchors": Room("boxes errors types", "numpy torch torchvision"),
    "boxes": Room("errors types", "numpy torch torchvision"),
    "drawing": Room("types", "cv2 numpy torch"),
    "types": Room("errors", "torch"),
    "errors": Room(),
}

# Libraries with a room of their own: the rest of the package would run without them, or with another.
AT_HOME = {
    "ray": "cluster sweeps",
    "mlflow": "tracking",
    "hydra": "config",
    "omegaconf": "config",
    "pytorch_lightning": "bench cluster data training",
    "webdataset": "bench data",
    "torchmetrics": "metrics",
}

# Seconds to import, so that no `onestage --help` may wait for them.
HEAVY = {"cv2", "hydra", "mlflow", "numpy", "omegaconf", "pytorch_lightning", "ray", "torch"}
HEAVY |= {"torchmetrics", "torchvision"}


class Import(NamedTuple):
    """One imported module, such as ``onestage.boxes.iou``, and where; ``lazy`` in a function or for type checkers."""

    room: str
    where: str
    module: str
    lazy: bool


def imports_of(path: Path, root: Path = PACKAGE) -> Iterator[Import]:
    relative = path.relative_to(root)
    room = relative.parts[0].removesuffix(".py")

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            modules: list[str] = []
            if isinstance(child, ast.Import):
                modules = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{relative}:{child.lineno}: imports are absolute here"
                modules = [f"{child.module}.{alias.name}" for alias in child.names]
            for module in modules:
                yield Import(room, f"{relative}:{child.lineno}", module, lazy)
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from visit(child, lazy or later)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


IMPORTS = [one for path in sorted(PACKAGE.rglob("*.py")) for one in imports_of(path)]


def between_rooms() -> Iterator[tuple[Import, str]]:
    """Imports of one room by another, and that other room."""
    for one in IMPORTS:
        parts = one.module.split(".")
        if parts[0] == "onestage" and parts[1] not in (one.room, "__version__"):
            yield one, parts[1]


def of_libraries() -> Iterator[tuple[Import, str]]:
    """Imports from outside of package and standard library, and the library."""
    for one in IMPORTS:
        library = one.module.split(".")[0]
        if library != "onestage" and library not in sys.stdlib_module_names:
            yield one, library


def test_every_room_is_in_the_table() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found <= set(ROOMS), "a new room: say in ROOMS what it builds on"
    assert set(ROOMS) - found <= {"losses"}  # planned, without a file yet


def test_the_table_has_no_circles() -> None:
    order = list(ROOMS)
    for name, room in ROOMS.items():
        assert all(order.index(other) > order.index(name) for other in room.rooms.split()), name


def test_rooms_import_only_the_rooms_that_they_may() -> None:
    wrong = [
        f"{one.where} imports {one.module}"
        for one, other in between_rooms()
        if other not in ROOMS[one.room].rooms.split() + ROOMS[one.room].lazily.split() * one.lazy
    ]
    assert wrong == []


def test_rooms_import_only_the_libraries_that_they_may() -> None:
    wrong = [
        f"{one.where} imports {one.module}"
        for one, library in of_libraries()
        if library not in ROOMS[one.room].libraries.split()
    ]
    assert wrong == []


@pytest.mark.parametrize("library", AT_HOME)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    homes = {one.room for one, found in of_libraries() if found == library}
    assert homes <= set(AT_HOME[library].split())
    assert all(library not in room.libraries.split() for name, room in ROOMS.items() if name not in AT_HOME[library])


def test_torchvisions_own_detectors_are_what_we_compare_with_not_what_we_use() -> None:
    assert [one.where for one in IMPORTS if one.module.startswith("torchvision.models.detection")] == []


def test_training_knows_no_detector_and_no_data() -> None:
    for name in ("training", "tracking"):
        assert not {"detectors", "data", "metrics"} & set((ROOMS[name].rooms + " " + ROOMS[name].lazily).split())


def test_the_source_root_is_no_package() -> None:
    """With ``platform/__init__.py``, ``import platform`` at the root would no longer be the standard library's."""
    assert not (PACKAGE.parent / "__init__.py").exists()


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, onestage.cli; print(*sys.modules, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "onestage.cli" in loaded
    assert HEAVY & set(loaded) == set()


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        "import ray.train\nfrom a.b import c, d\nclass X:\n    import e\n"
        "def f():\n    import g\nif TYPE_CHECKING:\n    import h\ntry:\n    import i\nexcept ImportError:\n    pass\n"
    )
    found = [(one.module, one.lazy) for one in imports_of(tmp_path / "room.py", tmp_path)]
    assert found == [
        ("ray.train", False), ("a.b.c", False), ("a.b.d", False), ("e", False), ("g", True), ("h", True), ("i", False)
    ]  # fmt: skip


def test_the_sweeper_is_for_any_hydra_app() -> None:
    found = {one.module.split(".")[0] for path in PLUGINS.rglob("*.py") for one in imports_of(path, PLUGINS)}
    assert found - sys.stdlib_module_names == {"hydra", "hydra_plugins", "omegaconf", "optuna", "ray"}
    assert not (PLUGINS / "__init__.py").exists(), "hydra_plugins is a namespace that packages share"
