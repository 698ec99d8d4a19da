"""``onestage submit``: what it refuses before anything is sent."""

from pathlib import Path

import pytest

from onestage.cli import main
from onestage.cluster import jobs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "digits"], "submit train takes KEY=VALUE …, not digits"),
        (["evaluate", "split=test"], "submit evaluate takes RUN KEY=VALUE …, not KEY=VALUE alone"),
        (["sweep", "resume"], "submit sweep takes KEY=VALUE … or resume NAME KEY=VALUE …, not resume"),
        (["train", "trainer.max_epoch=1"], "the nearest is 'trainer.max_epochs'"),
        (["train", "cluster=local", "--address", "http://127.0.0.1:9"], "no Ray dashboard at http://127.0.0.1:9"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error


def test_a_ray_of_a_jobs_own_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_client", lambda address: None)
    assert main(["submit", "train", "cluster=local", "--address", "http://127.0.0.1:9"]) == 2
    assert "leave that out, or say cluster=none" in capsys.readouterr().err
