"""What the project promises around the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_pin_is_exact_and_names_no_registry() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 100
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+( ; .+)?", line)]
    assert wrong == []


def test_all_that_is_asked_for_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {re.split(r"[\[<>=!~ ]", one)[0].lower() for one in wanted}
    assert names <= pinned


def test_the_source_root_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_jobs_are_thin() -> None:
    assert all(len(job.read_text().splitlines()) <= 20 for job in (ROOT / "jobs").glob("*.py"))


def test_ci_runs_every_test() -> None:
    """The three targets share them out by their marks: quick, slow, on several hosts."""
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert steps == ["make test", "make test-all", "make test-cluster"]
