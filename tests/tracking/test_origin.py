"""What a run says of the code that made it."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from onestage.tracking import origin


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("width = 1\n")
    me = ["-c", "user.name=ann", "-c", "user.email=ann@example.org"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], check=True)
    return tmp_path


def test_a_clean_checkout_has_no_changes(checkout: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert origin.code() == (commit, None)
    assert origin.origin_tags()["mlflow.source.git.commit"] == commit


def test_changes_are_the_diff_and_the_names_of_new_files(checkout: Path) -> None:
    (checkout / "model.py").write_text("width = 2\n")
    (checkout / "notes.txt").write_text("not shown\n")
    told = origin.code().changes
    assert told is not None and "-width = 1\n+width = 2\n" in told
    assert told.startswith("# not in git: notes.txt\n") and "not shown" not in told


def test_a_large_change_is_cut_and_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "CHANGES_LIMIT", 1000)
    (checkout / "model.py").write_text("width = 2\n" * 1000)
    told = origin.code().changes
    assert told is not None and len(told) < 1100 and "# cut here, of " in told


def test_no_program_that_a_repository_names_is_run(checkout: Path) -> None:
    (checkout / ".gitattributes").write_text("*.py diff=evil\n")
    subprocess.run(["git", "config", "diff.evil.textconv", f"touch {checkout}/ran; cat"], check=True)
    subprocess.run(["git", "config", "diff.external", f"touch {checkout}/ran"], check=True)
    (checkout / "model.py").write_text("width = 2\n")
    told = origin.code().changes
    assert told is not None and "+width = 2" in told
    assert not (checkout / "ran").exists()


def test_without_a_checkout_there_is_nothing_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert origin.code() == (None, None)
    assert "mlflow.source.git.commit" not in origin.origin_tags()


def test_a_package_that_was_sent_says_what_the_checkout_said(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "model.py").write_text("width = 2\n")
    told = origin.code()
    assert told.commit is not None and told.changes is not None
    monkeypatch.chdir(tmp_path_factory.mktemp("node"))
    monkeypatch.setattr(origin, "SHIPPED", checkout / "onestage" / "origin")
    told.save(checkout / "onestage" / "origin")
    assert origin.code() == told


def test_packages_are_listed_as_pip_writes_requirements() -> None:
    lines = origin.packages().splitlines()
    assert f"numpy=={np.__version__}" in lines and any(line.startswith("onestage==") for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
