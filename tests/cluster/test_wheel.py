"""The wheel that is sent to a cluster: this package and nothing else, the same bytes each time, within the limit."""

import base64
import csv
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from onestage.cluster import wheel
from onestage.errors import InputError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def run(code: str, path: Path) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_has_the_package_and_its_settings_and_nothing_else(built: Path) -> None:
    assert {name.partition("/")[0].partition("-")[0] for name in names(built)} == {"onestage", "hydra_plugins"}
    assert {"onestage/cli/app.py", "onestage/conf/train.yaml", "onestage/conf/cluster/ray.yaml"} <= set(names(built))
    assert not [name for name in names(built) if name.endswith((".pyc", ".tar", ".ckpt", ".db"))]


def test_is_small(built: Path) -> None:
    assert built.stat().st_size < 2 * 2**20


def test_is_the_same_bytes_each_time(built: Path, tmp_path: Path) -> None:
    assert wheel.build(tmp_path).read_bytes() == built.read_bytes()


def test_unpacked_wins_over_the_installed_package(tmp_path: Path) -> None:
    plugins, package = wheel.unpacked(tmp_path)
    assert (plugins.name, package.name) == ("hydra_plugins", "onestage")
    code = "import onestage.config.folder as f; print(f.CONF, (f.CONF / 'train.yaml').is_file())"
    assert run(code, package.parent) == f"{package / 'conf'} True"


def test_over_the_limit_names_the_five_largest_files(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        wheel.build(tmp_path, limit_bytes=100_000)
    told = str(error.value)
    assert "0.1" in told and "cluster.ship=false" in told and "\n" not in told
    assert told.count("MiB)") == 5


@pytest.fixture
def installed(built: Path, tmp_path: Path) -> Path:
    """A folder with the wheel installed in it, as an installer leaves it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    info = next(site.glob("*.dist-info"))
    (info / "INSTALLER").write_text("pip\n")
    with (info / "RECORD").open("a") as record:
        record.write(f"{info.name}/INSTALLER,,\n../../bin/onestage,,\nonestage/__pycache__/__init__.pyc,,\n")
    return site


REPACK = (
    "import sys; from pathlib import Path; from onestage.cluster import wheel; print(wheel.build(Path(sys.argv[1])))"
)


class TestOfAnInstalledPackage:
    def repacked(self, site: Path, out: Path) -> Path:
        return Path(run(REPACK.replace("sys.argv[1]", repr(str(out))), site))

    def test_holds_what_the_first_one_held(self, installed: Path, built: Path, tmp_path: Path) -> None:
        again = self.repacked(installed, tmp_path / "out")
        with zipfile.ZipFile(built) as first, zipfile.ZipFile(again) as second:
            assert sorted(first.namelist()) == sorted(second.namelist())
            assert all(first.read(name) == second.read(name) for name in names(built) if not name.endswith("RECORD"))

    def test_is_the_same_bytes_each_time(self, installed: Path, tmp_path: Path) -> None:
        one, two = (self.repacked(installed, tmp_path / folder) for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    def test_has_a_true_record(self, installed: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(self.repacked(installed, tmp_path / "out")) as archive:
            [record] = [name for name in archive.namelist() if name.endswith("RECORD")]
            rows = list(csv.reader(archive.read(record).decode().splitlines()))
            assert {row[0] for row in rows} == set(archive.namelist())
            for name, digest, size in rows:
                if name != record:
                    content = archive.read(name)
                    assert int(size) == len(content)
                    told = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
                    assert told == hashlib.sha256(content).digest()


def test_of_a_package_that_nobody_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wheel, "PACKAGE", tmp_path / "a" / "b" / "onestage")
    monkeypatch.setattr(importlib.metadata, "distribution", none)
    with pytest.raises(InputError, match=r"cluster\.ship=false"):
        wheel.build(tmp_path)
