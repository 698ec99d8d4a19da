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


def test_a_note_is_a_line_and_so_is_what_is_waited_for_but_not_at_every_poll(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told every second for 25 s: said at 0, 10 and 20 s."""
    now = 0.0
    monkeypatch.setattr("onestage.cluster.progress.time.monotonic", lambda: now)
    with ProgressBar() as bar:
        for second in range(25):
            now = float(second)
            bar({"waiting": f"asked for 4 workers of 1 CPU each [{second} s]"})
        bar({"note": "lost at step 7: worker 1 [gone]"})
        bar({"lost": "worker 1", "pause_s": 5.0, "restart": 1, "limit": 8})
        bar({"started": {"rank": 0}})
    assert capsys.readouterr().err.splitlines() == [
        "starting",
        "waiting: asked for 4 workers of 1 CPU each [0 s]",
        "waiting: asked for 4 workers of 1 CPU each [10 s]",
        "waiting: asked for 4 workers of 1 CPU each [20 s]",
        "lost at step 7: worker 1 [gone]",
    ]
