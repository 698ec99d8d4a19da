"""A worker that stands still is found, named and ended; numbers by hand, with a clock of the test's own."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onestage.cluster.board import Beat, Board, Command
from onestage.cluster.watchdog import Heart, Verdict, Watch, Watchdog, stacks
from onestage.training.pulse import Pulse

from ..training.test_pulse import Loader, trained


def beat(rank: int, number: int, *, marks: int = 0, step: int = 0, count: int = 0, **changes: Any) -> Beat:
    values: dict[str, Any] = {
        "rank": rank,
        "host": f"host{rank}",
        "node": "",
        "pid": 100 + rank,
        "number": number,
        "step": step,
        "place": (step, count),
        "doing": f"forward of step {step + 1}",
        "marks": marks,
        "idle_s": 0.0,
        "warm": True,
        "done": False,
    }
    return Beat(**(values | changes))  # type: ignore[typeddict-item]


def look_until(watch: Watch, beats: Callable[[int], dict[int, Beat]], *, seconds: int) -> tuple[int, Verdict] | None:
    """Looks every two seconds from 0 on, and says when there was a verdict."""
    for now in range(0, seconds, 2):
        if (verdict := watch.look(beats(now), now)) is not None:
            return now, verdict
    return None


class TestWatch:
    def test_a_group_that_goes_on_is_left_alone(self) -> None:
        watch = Watch(hang_s=30, num_workers=2)
        assert look_until(watch, lambda now: {r: beat(r, now, marks=now) for r in (0, 1)}, seconds=1000) is None

    def test_the_rank_behind_the_others_is_named(self) -> None:
        """Marks stop at 20 s; the first look beyond 20 + 30 s is at 52 s. Rank 1 has done less since step 5."""
        watch = Watch(hang_s=30, num_workers=3)
        found = look_until(
            watch,
            lambda now: {
                rank: beat(rank, now, marks=min(now, 20), step=5, count=1 if rank == 1 else 2) for rank in (0, 1, 2)
            },
            seconds=100,
        )
        assert found == (52, Verdict(1, False, 32))

    def test_a_rank_that_made_more_marks_may_still_be_behind(self) -> None:
        """Rank 0 saw more batches of a validation, but stands at step 5 where rank 1 is at 6."""
        watch = Watch(hang_s=30, num_workers=2)
        beats = {0: beat(0, 0, marks=900, step=5, count=9), 1: beat(1, 0, marks=10, step=6)}
        found = look_until(watch, lambda now: {r: {**one, "number": now} for r, one in beats.items()}, seconds=100)
        assert found is not None and found[1].rank == 0

    def test_ranks_at_the_same_place_are_all_named(self) -> None:
        watch = Watch(hang_s=30, num_workers=3)
        found = look_until(watch, lambda now: {r: beat(r, now, step=min(r, 1)) for r in (1, 2, 0)}, seconds=100)
        assert found is not None and found[1][:2] == (0, False)
        watch = Watch(hang_s=30, num_workers=2)
        found = look_until(watch, lambda now: {r: beat(r, now) for r in (1, 0)}, seconds=100)
        assert found == (32, Verdict(0, False, 32, (1,)))

    def test_a_validation_is_progress(self) -> None:
        """Its marks move, though neither step nor place does."""
        watch = Watch(hang_s=30, num_workers=1)
        assert look_until(watch, lambda now: {0: beat(0, now, marks=now // 20, step=5)}, seconds=1000) is None

    def test_before_the_first_step_five_minutes_are_given(self) -> None:
        watch = Watch(hang_s=30, num_workers=2)
        found = look_until(watch, lambda now: {0: beat(0, now), 1: beat(1, now, warm=False)}, seconds=1000)
        assert found is not None and found[0] == 302

    def test_a_longer_limit_counts_before_the_first_step_too(self) -> None:
        watch = Watch(hang_s=600, num_workers=1)
        found = look_until(watch, lambda now: {0: beat(0, now, warm=False)}, seconds=1000)
        assert found is not None and found[0] == 602

    def test_a_rank_without_beats_is_silent_after_a_minute(self) -> None:
        """The last beat is that of 20 s; the first look beyond 20 + 60 s is at 82 s."""
        watch = Watch(hang_s=600, num_workers=2)
        found = look_until(
            watch, lambda now: {0: beat(0, now, marks=1), 1: beat(1, min(now, 20), marks=5)}, seconds=200
        )
        assert found == (82, Verdict(1, True, 62))

    def test_a_short_limit_makes_silence_as_short_but_not_shorter_than_ten_seconds(self) -> None:
        watch = Watch(hang_s=4, num_workers=2)
        found = look_until(watch, lambda now: {0: beat(0, now, marks=now), 1: beat(1, 0, marks=0)}, seconds=200)
        assert found == (12, Verdict(1, True, 12))

    def test_a_rank_that_is_done_is_not_waited_for(self) -> None:
        watch = Watch(hang_s=30, num_workers=2)
        beats = {0: beat(0, 1, done=True), 1: beat(1, 1, done=True)}
        assert look_until(watch, lambda now: beats, seconds=1000) is None

    def test_after_a_sleep_of_its_own_it_accuses_nobody(self) -> None:
        """Between 10 s and 500 s the driver itself was stopped."""
        watch = Watch(hang_s=30, num_workers=1)
        assert look_until(watch, lambda now: {0: beat(0, now)}, seconds=12) is None
        assert watch.look({0: beat(0, 10)}, 500.0) is None
        assert watch.look({0: beat(0, 11)}, 512.0) is None
        assert watch.look({0: beat(0, 12)}, 524.0) is None
        assert watch.look({0: beat(0, 13)}, 531.0) == Verdict(0, False, 31.0)

    def test_zero_is_never(self) -> None:
        watch = Watch(hang_s=0, num_workers=1)
        assert look_until(watch, lambda now: {0: beat(0, 1)}, seconds=10_000) is None

    def test_nobody_heard_of_is_nobody_found(self) -> None:
        assert look_until(Watch(hang_s=30, num_workers=2), lambda now: {}, seconds=1000) is None


class Group:
    """Beats that stand still, a clock, and a record of what the watchdog did about it."""

    def __init__(self, folder: Path, beats: dict[int, Beat], *, silent: tuple[int, ...] = ()) -> None:
        self.now = 0.0
        self.beats = beats
        self.silent = silent
        self.orders: list[Command] = []
        self.killed: list[int] = []
        self.watchdog = Watchdog(
            hang_s=30,
            num_workers=len(beats),
            folder=folder,
            beats=lambda: self.beats,
            order=self.orders.append,
            kill=lambda one: self.killed.append(one["pid"]),
            clock=lambda: self.now,
        )

    def go(self, seconds: float) -> list[str]:
        said = []
        end = self.now + seconds
        while self.now < end:
            self.now += 1.0
            for rank, one in self.beats.items():
                if rank not in self.silent:
                    one["number"] += 1
            if (text := self.watchdog.look()) is not None:
                said.append(text)
        return said


class TestWatchdog:
    def test_the_verdict_names_rank_host_step_and_function_and_the_file_holds_all_stacks(self, tmp_path: Path) -> None:
        group = Group(tmp_path, {0: beat(0, 0, step=6, count=2), 1: beat(1, 0, step=6, count=0)})
        group.beats[1]["doing"] = "waiting for data of step 7"
        assert group.go(33) == []
        assert group.orders == ["stacks"]
        for rank, where in enumerate(["wait (reducer.py:5)", "read (shards.py:12) < fetch (loader.py:3)"]):
            group.beats[rank]["stacks"] = {"where": where, "in_collective": False, "text": f"stack of {rank}\n"}
        (line,) = group.go(1)
        assert group.orders == ["stacks", "die"]
        (file,) = tmp_path.glob("hang-*.txt")
        assert line == (
            "worker 1 on host1 stands still for 31 s (cluster.hang) after step 6, waiting for data of step 7, "
            f"in read (shards.py:12) < fetch (loader.py:3); all stacks are in {file}"
        )
        text = file.read_text()
        assert "stack of 0" in text and "stack of 1" in text and "worker 0 on host0, process 100" in text
        assert group.watchdog.verdict == line

    def test_who_only_waits_for_the_others_is_not_blamed(self, tmp_path: Path) -> None:
        group = Group(tmp_path, {0: beat(0, 0), 1: beat(1, 0)})
        group.beats[0]["stacks"] = {"where": "broadcast", "in_collective": True, "text": ""}
        group.beats[1]["stacks"] = {"where": "write", "in_collective": False, "text": ""}
        (line,) = group.go(60)
        assert line.startswith("worker 1 on host1 stands still (like 0) for 31 s")

    def test_a_silent_worker_is_not_waited_for_and_killed(self, tmp_path: Path) -> None:
        group = Group(tmp_path, {0: beat(0, 0), 1: beat(1, 0)}, silent=(1,))
        group.beats[0]["marks"] = 1
        group.beats[0]["stacks"] = {"where": "wait", "in_collective": True, "text": "stack of 0"}
        (line,) = group.go(40)
        assert line.startswith("worker 1 on host1 is silent for 31 s: its process is stopped or blocked")
        assert "last word was step 0, forward of step 1" in line
        (file,) = tmp_path.glob("hang-*.txt")
        assert "no stack: it did not answer" in file.read_text()
        assert group.killed == []
        assert group.go(40) == []
        assert group.killed == [100, 101]

    def test_stacks_that_do_not_come_are_waited_for_ten_seconds(self, tmp_path: Path) -> None:
        group = Group(tmp_path, {0: beat(0, 0)})
        assert group.go(40) == []
        assert len(group.go(2)) == 1

    def test_a_full_disk_does_not_hide_the_verdict(self, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        group = Group(blocked / "folder", {0: beat(0, 0)})
        (line,) = group.go(60)
        assert "worker 0 on host0 stands still" in line and "could not be written" in line
        assert group.orders == ["stacks", "die"]


def asleep_in_here(until: threading.Event) -> None:
    until.wait(30)


class TestHeart:
    def test_beats_come_on_their_own_and_the_last_says_that_it_is_over(self) -> None:
        beats: list[Beat] = []

        def send(one: Beat) -> list[Command]:
            beats.append(one)
            return []

        with Heart(Pulse(), send, rank=3, host="a", every_s=0.05):
            time.sleep(0.5)
        assert 5 <= len(beats) <= 12
        assert [one["number"] for one in beats] == list(range(1, len(beats) + 1))
        assert [one["done"] for one in beats] == [False] * (len(beats) - 1) + [True]
        assert (beats[0]["rank"], beats[0]["host"]) == (3, "a")
        assert beats[0]["doing"] == "setting up" and not beats[0]["warm"]

    def test_stop_reaches_the_training(self) -> None:
        board = Board()
        with Heart(Pulse(), board.beat, rank=0, host="a", every_s=0.05) as heart:
            time.sleep(0.2)
            assert not heart.stop_asked
            board.order("stop")
            time.sleep(0.2)
            assert heart.stop_asked

    def test_a_stuck_function_is_in_the_stacks_and_the_heart_is_not(self) -> None:
        board, pulse, until = Board(), Pulse(), threading.Event()
        stuck = threading.Thread(target=asleep_in_here, args=(until,), name="stuck-loader")
        stuck.start()
        assert stuck.ident is not None
        pulse.thread = stuck.ident
        with Heart(pulse, board.beat, rank=0, host="a", every_s=0.05):
            board.order("stacks")
            time.sleep(0.5)
            sent = board.latest()[0]["stacks"]
        until.set()
        stuck.join()
        assert "asleep_in_here (cluster/test_watchdog.py:" in sent["where"]
        assert sent["text"].startswith("thread stuck-loader (training):")
        assert "thread MainThread:" in sent["text"]
        assert "thread heart" not in sent["text"]
        assert not sent["in_collective"]

    def test_die_ends_the_process(self) -> None:
        ends: list[str] = []
        board = Board()
        board.order("die")
        heart = Heart(Pulse(), board.beat, rank=0, host="a", every_s=0.05, end=ends.append)
        heart.start()
        time.sleep(0.2)
        assert ends and "watchdog" in ends[0]
        heart.close()

    def test_a_board_that_is_gone_ends_the_process_but_one_that_comes_back_does_not(self) -> None:
        ends: list[str] = []
        away = threading.Event()

        def send(_: Beat) -> list[Command]:
            if away.is_set():
                raise TimeoutError
            return []

        heart = Heart(Pulse(), send, rank=0, host="a", every_s=0.05, gone_s=0.5, end=ends.append)
        heart.start()
        away.set()
        time.sleep(0.25)
        away.clear()
        time.sleep(0.5)
        assert ends == []
        away.set()
        time.sleep(1.0)
        assert ends and "did not answer" in ends[0] and "TimeoutError" in ends[0]
        heart.close()

    def test_the_process_really_ends(self) -> None:
        code = """
            import time
            from types import SimpleNamespace
            from onestage.cluster.watchdog import Heart
            now = {"step": 0, "place": (0, 0), "doing": "", "marks": 0, "since": 0.0, "warm": False}
            pulse = SimpleNamespace(thread=0, now=lambda: now)
            Heart(pulse, lambda beat: ["die"], rank=0, host="a", every_s=0.1).start()
            time.sleep(60)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "onestage: the driver's watchdog ended this worker group"


def never_comes(until: threading.Event) -> None:
    until.wait(60)


def test_a_training_whose_loader_sleeps_is_named_with_the_sleeping_function(tmp_path: Path) -> None:
    """One batch comes, the second never does; the watchdog is told to wait for two seconds only."""
    until, board, files = threading.Event(), Board(), tmp_path / "run"
    asked = 0

    def second_never_comes() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            never_comes(until)

    def train() -> None:
        pulse = Pulse()
        with Heart(pulse, board.beat, rank=0, host="a", every_s=0.2, end=lambda why: until.set()):
            trained(tmp_path, pulse, loader=Loader(3, second_never_comes))

    watchdog = Watchdog(
        hang_s=2, num_workers=1, folder=files, beats=board.latest, order=board.order, kill=lambda one: None
    )
    training = threading.Thread(target=train, name="training")
    training.start()
    end, verdict = time.monotonic() + 60, None
    while verdict is None and time.monotonic() < end:
        time.sleep(0.1)
        verdict = watchdog.look()
    training.join(60)
    assert not training.is_alive()
    assert verdict is not None
    assert "stands still for " in verdict and "after step 1, waiting for data of step 2, in " in verdict
    assert "never_comes (cluster/test_watchdog.py:" in verdict
    (file,) = files.glob("hang-*.txt")
    assert "thread training (training):" in file.read_text()


class TestBoard:
    def test_of_steps_only_the_last_is_kept_and_other_messages_in_their_order(self) -> None:
        board = Board()
        for message in ({"step": 1}, {"note": "a"}, {"step": 2}, {"note": "b"}):
            board.put(message)
        assert board.take() == [{"note": "a"}, {"step": 2}, {"note": "b"}]
        assert board.take() == []

    def test_it_never_holds_more_than_a_thousand(self) -> None:
        board = Board()
        for number in range(1500):
            board.put({"note": str(number)})
        assert [one["note"] for one in board.take()] == [str(number) for number in range(500, 1500)]

    def test_every_beat_is_answered_with_all_commands(self) -> None:
        board = Board()
        assert board.beat(beat(0, 1)) == []
        board.order("stop")
        board.order("stop")
        assert board.beat(beat(1, 1)) == ["stop"]
        board.order("die")
        assert board.beat(beat(0, 2)) == ["stop", "die"]
        assert {rank: one["number"] for rank, one in board.latest().items()} == {0: 2, 1: 1}


def test_a_thread_that_is_gone_has_no_stack() -> None:
    assert stacks(-1)["where"] == ""


STOPPED_WORKER = """
import os, secrets, sys, threading, time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
import ray

folder, num_workers = Path(sys.argv[1]), int(sys.argv[2])
ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from onestage.cluster.board import start_board
from onestage.cluster.watchdog import watchdog_of


def worker(config):
    import os, signal, time
    import ray
    from onestage.cluster.watchdog import heart_of
    from onestage.training.pulse import Pulse

    rank = ray.train.get_context().get_world_rank()
    (config["folder"] / f"pid-{rank}").write_text(str(os.getpid()))
    with heart_of(Pulse(), config["board"], rank=rank):
        time.sleep(4)
        if rank == config["num_workers"] - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)


def fit():
    try:
        trainer.fit()
    except Exception as error:
        pass


board = start_board()
trainer = TorchTrainer(
    worker,
    train_loop_config={"board": board, "folder": folder, "num_workers": num_workers},
    scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1}),
    torch_config=TorchConfig(backend="gloo"),
    run_config=RunConfig(
        name="stopped",
        storage_path=str(folder / "ray"),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
    ),
)
watchdog = watchdog_of(board, hang_s=4, num_workers=num_workers, folder=folder)
thread = threading.Thread(target=fit, daemon=True)
thread.start()
while thread.is_alive():
    if watchdog.look() is not None:
        found = time.monotonic()
    thread.join(0.3)
print(f"ended {time.monotonic() - found:.1f} s after the verdict", file=sys.stderr)
print(watchdog.verdict)
for _ in range(100):
    left = [pid.name for pid in folder.glob("pid-*") if Path("/proc", pid.read_text()).exists()]
    if not left:
        break
    time.sleep(0.1)
print("processes left:", left)
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_worker_of_ray_is_found_and_its_group_ended(num_workers: int, tmp_path: Path) -> None:
    """The last worker is stopped (SIGSTOP), so that it can't hear that it should end."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WORKER, str(tmp_path), str(num_workers)],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdict, left = done.stdout.splitlines()[-2:]
    assert verdict.startswith(f"worker {num_workers - 1} on ") and "is silent for 1" in verdict
    assert left == "processes left: []"
    assert float(done.stderr.split("ended ")[-1].split()[0]) < 60
