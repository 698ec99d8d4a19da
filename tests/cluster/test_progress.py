"""What a person reads while a training runs."""

import pytest

from onestage.cluster.progress import ProgressBar


def test_skipped_images_are_named_and_many_of_them_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as bar:
        bar({"skipped": [f"{n:06d}: [train-0.tar] is missing" for n in range(5)], "file": "runs/1/skipped.txt"})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "starting",
        "skipped 000000: [train-0.tar] is missing",
        "skipped 000001: [train-0.tar] is missing",
        "skipped 000002: [train-0.tar] is missing",
        "skipped 2 more: see runs/1/skipped.txt",
    ]
