import json
import logging
import random
import time
from itertools import pairwise

import pytest

from onestage.errors import InputError
from onestage.tracking import spool as spool_module
from onestage.tracking.delivery import POINTS_PER_CALL, Refused
from onestage.tracking.journal import Journal
from onestage.tracking.spool import Spool, open_spool


class Store:
    """A tracking store in memory: it keeps every point that it is sent, so that a second sending shows."""

    def __init__(self):
        self.received = []
        self.items = []
        self.calls = []
        self.down = False
        self.bad_keys = set()
        self.bad_kinds = set()

    def _answer(self):
        if self.down:
            raise ConnectionError("http://ann:pw@store is down")

    def latest_steps(self):
        self._answer()
        latest = {}
        for point in self.received:
            latest[point.key] = max(point.step, latest.get(point.key, 0))
        return latest

    def points(self, points):
        self._answer()
        self.calls.append(len(points))
        if any(point.key in self.bad_keys for point in points):
            raise Refused("bad key")
        self.received += points

    def item(self, kind, fields, payload):
        self._answer()
        if kind in self.bad_kinds:
            raise PermissionError(kind)
        self.items.append((kind, fields, {path.name: path.read_text() for path in payload.iterdir()}))

    def steps(self, key="loss"):
        return [point.step for point in self.received if point.key == key]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(spool_module, "POLL_S", 0.02)
    monkeypatch.setattr(spool_module, "LONGEST_WAIT_S", 0.1)


@pytest.fixture
def store():
    return Store()


def until(condition, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestMetrics:
    def test_arrive_once_and_in_order(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        for step in range(500):
            spool.append({"loss": 1 / (step + 1), "lr": 0.1}, step)
        assert spool.close(5)
        assert store.steps("loss") == store.steps("lr") == list(range(500))
        assert [point.value for point in store.received if point.key == "loss"][:3] == [1, 1 / 2, 1 / 3]

    def test_are_a_readable_record(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        before = int(time.time() * 1000)
        spool.append({"loss": 0.5}, 3)
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert (line["step"], line["metrics"]) == (3, {"loss": 0.5})
        assert before <= line["time"] <= time.time() * 1000
        assert spool.close(5)
        assert int((tmp_path / "metrics.sent").read_text()) == (tmp_path / "metrics.jsonl").stat().st_size

    def test_many_in_one_step_are_sent_in_calls_that_the_store_allows(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({f"val/ap/{name}": 0.5 for name in range(2500)}, 1)
        assert spool.close(5)
        assert len(store.received) == 2500
        assert max(store.calls) <= POINTS_PER_CALL

    def test_a_refused_point_is_left_out_alone(self, store, tmp_path, caplog):
        store.bad_keys = {"bad"}
        spool = Spool(delivery=store, folder=tmp_path)
        for step in range(5):
            spool.append({"loss": 1.0, "bad": 1.0}, step)
        assert spool.close(5)
        assert store.steps() == [0, 1, 2, 3, 4]
        assert store.steps("bad") == []
        assert warnings(caplog) == ["the store refuses bad: bad key"]

    def test_nonsense_is_a_warning(self, store, tmp_path, caplog):
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": "much"}, 0)
        spool.append({"loss": None}, 1)
        spool.append({"loss": 1.0}, 2)
        assert spool.close(5)
        spool.append({"loss": 1.0}, 3)
        assert store.steps() == [2]
        assert len(warnings(caplog)) == 1

    def test_a_call_costs_little(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        metrics = {f"train/loss/{part}": 0.5 for part in ("box", "objectness", "class", "prior")}
        began = time.perf_counter()
        for step in range(1000):
            spool.append(metrics, step)
        assert (time.perf_counter() - began) / 1000 < 300e-6
        assert spool.close(5)

    def test_the_disk_backlog_is_bounded(self, store, tmp_path, caplog, monkeypatch):
        store.down = True
        monkeypatch.setattr(spool_module, "BACKLOG_LIMIT_BYTES", 1000)
        spool = Spool(delivery=store, folder=tmp_path)
        for step in range(100):
            spool.append({"loss": 1.0}, step)
        assert (tmp_path / "metrics.jsonl").stat().st_size < 1100
        assert sum("not kept" in message for message in warnings(caplog)) == 1
        spool.close(0)


class TestOutage:
    def test_one_warning_then_everything_arrives(self, store, tmp_path, caplog):
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 1.0}, 0)
        until(lambda: store.steps() == [0])
        store.down = True
        for step in range(1, 50):
            spool.append({"loss": 1.0}, step)
            time.sleep(0.01)
        store.down = False
        assert spool.close(5)
        assert store.steps() == list(range(50))
        [message] = warnings(caplog)
        assert "the tracking store is away" in message
        assert "pw" not in message

    def test_waits_grow_to_their_limit(self, store, tmp_path, monkeypatch):
        tries = []
        monkeypatch.setattr(store, "_answer", lambda: tries.append(time.monotonic()) or 1 / 0)
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 1.0}, 0)
        until(lambda: len(tries) >= 6)
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        assert gaps[0] >= 0.02
        assert gaps[1] >= 0.04
        assert all(gap >= 0.1 for gap in gaps[3:])
        spool.close(0)

    def test_what_is_unsent_at_the_end_is_sent_by_the_next_spool(self, store, tmp_path):
        store.down = True
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 1.0}, 0)
        spool.put("tags", {"a": "b"})
        assert not spool.close(0.1)
        store.down = False
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 1.0}, 1)
        assert spool.close(5)
        assert store.steps() == [0, 1]
        assert store.items == [("tags", {"a": "b"}, {})]

    def test_chance_outages_lose_and_double_nothing(self, store, tmp_path, monkeypatch):
        """Calls fail before or after the store took them, and the process dies at any time."""
        chance = random.Random(7)
        take = store.points

        def unreliable(points):
            if chance.random() < 0.3:
                raise ConnectionError("before")
            take(points)
            if chance.random() < 0.3:
                raise ConnectionError("after")

        monkeypatch.setattr(store, "points", unreliable)
        monkeypatch.setattr(spool_module, "LONGEST_WAIT_S", 0.02)
        step = 0
        for _life in range(8):
            spool = Spool(delivery=store, folder=tmp_path)
            for _ in range(20):
                spool.append({"loss": 1.0}, step)
                spool.append({"lr": 1.0}, step)
                step += 1
                time.sleep(0.002)
            spool.close(0)
        assert Spool(delivery=store, folder=tmp_path).close(10)
        assert store.steps("loss") == store.steps("lr") == list(range(160))


class TestCrash:
    def test_between_sending_and_noting_it(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        for step in range(10):
            spool.append({"loss": 1.0}, step)
        assert spool.close(5)
        (tmp_path / "metrics.sent").write_text("0")
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 1.0}, 10)
        assert spool.close(5)
        assert store.steps() == list(range(11))

    def test_in_the_middle_of_a_line(self, store, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5, "metrics": {"loss": 1.0}}\n{"step": 2, "ti')
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 2.0}, 2)
        assert spool.close(5)
        assert [(point.step, point.value) for point in store.received] == [(1, 1.0), (2, 2.0)]

    def test_that_left_zeros(self, store, tmp_path):
        (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 20 + b"\n")
        spool = Spool(delivery=store, folder=tmp_path)
        spool.append({"loss": 2.0}, 2)
        assert spool.close(5)
        assert store.steps() == [2]

    def test_in_the_middle_of_a_parcel(self, store, tmp_path):
        half = tmp_path / "files" / "00000001.part" / "payload"
        half.mkdir(parents=True)
        (half / "weights").write_text("half")
        assert Spool(delivery=store, folder=tmp_path).close(5)
        assert store.items == []
        assert not half.exists()


class TestResume:
    def test_steps_trained_twice_are_logged_once_as_first(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path)
        for step in range(10):
            spool.append({"loss": 1.0}, step)
        assert spool.close(5)
        resumed = Spool(delivery=store, folder=tmp_path, resumed=True)
        for step in range(6, 14):
            resumed.append({"loss": 2.0, "lr": 2.0}, step)
        assert resumed.close(5)
        assert store.steps("loss") == list(range(14))
        assert store.steps("lr") == list(range(6, 14))
        assert [point.value for point in store.received if point.key == "loss"] == [1.0] * 10 + [2.0] * 4

    def test_on_another_host_the_store_is_asked(self, store, tmp_path):
        first = Spool(delivery=store, folder=tmp_path / "a")
        for step in range(10):
            first.append({"loss": 1.0}, step)
        assert first.close(5)
        second = Spool(delivery=store, folder=tmp_path / "b", resumed=True)
        for step in range(6, 14):
            second.append({"loss": 2.0}, step)
        assert second.close(5)
        assert store.steps() == list(range(14))


class TestParcels:
    def test_arrive_in_order_as_they_were_when_queued(self, store, tmp_path):
        spool = Spool(delivery=store, folder=tmp_path / "spool")
        for number in range(12):
            spool.put("artifact", {"n": number}, lambda payload, n=number: (payload / "file").write_text(str(n)))
        assert spool.close(5)
        assert store.items == [("artifact", {"n": n}, {"file": str(n)}) for n in range(12)]
        assert list((tmp_path / "spool" / "files").iterdir()) == []

    def test_that_can_not_be_written_are_a_warning(self, store, tmp_path, caplog):
        spool = Spool(delivery=store, folder=tmp_path)
        spool.put("artifact", {}, lambda payload: (tmp_path / "missing").read_text())
        assert spool.close(5)
        assert store.items == []
        assert "artifact not kept: FileNotFoundError" in caplog.text

    def test_one_that_the_store_does_not_take_is_set_aside(self, store, tmp_path, caplog):
        store.bad_kinds = {"model"}
        spool = Spool(delivery=store, folder=tmp_path)
        spool.put("model", {})
        spool.put("tags", {"a": "b"})
        spool.append({"loss": 1.0}, 0)
        assert spool.close(5)
        assert store.items == [("tags", {"a": "b"}, {})]
        assert "set aside" in caplog.text
        store.bad_kinds = set()
        assert Spool(delivery=store, folder=tmp_path).close(5)
        assert [kind for kind, _, _ in store.items] == ["tags", "model"]


def test_a_folder_belongs_to_one_run_and_keeps_no_password(tmp_path):
    open_spool(uri="http://ann:hunter2@host", run_id="a", folder=tmp_path, every_s=1.0).close(0)
    held = {"uri": "http://host", "run_id": "a", "every_s": 1.0}
    assert json.loads((tmp_path / "run.json").read_text()) == held
    with pytest.raises(InputError, match="holds what run a logged, not b"):
        open_spool(uri="http://host", run_id="b", folder=tmp_path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append({"loss": 1.0}, 0)

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, line):
            return self._file.write(line[:7])

        def fileno(self):
            return self._file.fileno()

    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(OSError, match="no space left"):
        journal.append({"loss": 1.0}, 1)
    monkeypatch.undo()
    journal.append({"loss": 1.0}, 1)
    assert [point.step for point in journal.unsent()[0]] == [0, 1]
