from pathlib import Path

import pytest
from hydra.errors import HydraException

from hydra_plugins.ray_tune_sweeper._journal import NAME, Journal


def filled(folder: Path) -> Path:
    journal = Journal.open(folder)
    journal.add("sweep", metric="loss")
    for number in range(3):
        journal.add("trial", trial=number, point={"lr": 0.1 * number}, overrides=[f"lr={0.1 * number}"])
        journal.add("start", trial=number, point={"lr": 0.1 * number}, overrides=[f"lr={0.1 * number}"])
    journal.add("result", trial=0, metrics={"loss": 3.0})
    journal.add("end", trial=0, state="done", value=2.0)
    journal.add("end", trial=1, state="lost", reason="its node is gone")
    journal.close()
    return folder / NAME


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    filled(tmp_path)
    journal = Journal.read(tmp_path)
    assert journal.header["metric"] == "loss" and journal.ended_because is None
    assert [trial.state for trial in journal.trials.values()] == ["done", "lost", "unfinished"]
    assert journal.trials[0].results == [{"loss": 3.0}] and journal.trials[0].value == 2.0
    assert journal.trials[2].point == {"lr": 0.2} and journal.trials[1].reason == "its node is gone"
    assert [trial.number for trial in journal.unfinished()] == [1, 2]


@pytest.mark.parametrize("damage", [b'{"event": "end", "tri', b'{"event": "end"}\n', b"\x00\x00\x00\n"])
def test_a_damaged_last_line_is_forgotten_and_written_over(tmp_path: Path, damage: bytes) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    assert Journal.read(tmp_path).trials[2].state == "unfinished"
    assert path.read_bytes() == whole + damage  # whoever only reads changes nothing
    journal = Journal.open(tmp_path)
    journal.add("end", trial=2, state="failed", reason="loss is nan")
    journal.close()
    assert path.read_bytes().startswith(whole) and len(path.read_bytes().splitlines()) == len(whole.splitlines()) + 1
    assert Journal.read(tmp_path).trials[2].reason == "loss is nan"


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    with pytest.raises(HydraException, match=f"{NAME}:3 is damaged"):
        Journal.read(tmp_path)


def test_one_alone_writes(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    with pytest.raises(HydraException, match="another sweep is at work"):
        Journal.open(tmp_path)
    journal.close()
    Journal.open(tmp_path).close()


def test_the_best_is_of_those_done_and_else_of_those_stopped(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    for number, (state, value) in enumerate([("failed", None), ("stopped", 0.1), ("stopped", 0.3)]):
        journal.add("trial", trial=number, point={}, overrides=[])
        journal.add("end", trial=number, state=state, value=value)
    best = journal.best(1)
    assert best and best.number == 2
    journal.add("trial", trial=3, point={}, overrides=[])
    journal.add("end", trial=3, state="done", value=0.2)
    assert [found.number for found in (journal.best(1), journal.best(-1)) if found] == [3, 3]
    journal.close()
