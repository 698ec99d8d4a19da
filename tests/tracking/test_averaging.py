import math
import random

import pytest

from onestage.tracking.averaging import FullRate, Line, grouped, points_of
from onestage.tracking.journal import Journal


def line(step, time_ms, **metrics):
    return Line(0, step, time_ms, {key.replace("_", "/", 1): value for key, value in metrics.items()})


def sent(lines, every_s=1.0, held=None):
    return [point for group in grouped(lines, every_s) for point in points_of(group, held or {})]


class TestSteps:
    def test_of_one_second_are_one_point_at_the_last_of_them(self):
        lines = [line(step, 5000 + 100 * step, train_loss=float(step)) for step in range(20)]
        found = [(point.step, point.value, point.time_ms) for point in sent(lines)]
        assert found == [(9, 4.5, 5900), (19, 14.5, 6900)]  # means of 0 to 9 and of 10 to 19

    def test_a_state_is_the_last_one_not_a_mean(self):
        lines = [line(n, 1000 + n, train_loss=1.0, train_lr=0.1 * n, epoch=n // 2, data_skipped=n) for n in range(4)]
        assert {point.key: point.value for point in sent(lines)} == {
            "train/loss": 1.0, "train/lr": pytest.approx(0.3), "epoch": 1, "data/skipped": 3,
        }  # fmt: skip

    def test_a_key_that_some_of_them_have_is_the_mean_of_those_at_its_own_last_step(self):
        lines = [line(1, 1000, train_loss=1.0, train_aux=4.0), line(2, 1100, train_loss=3.0)]
        assert [(point.key, point.step, point.value) for point in sent(lines)] == [
            ("train/loss", 2, 2.0),
            ("train/aux", 1, 4.0),
        ]

    def test_no_number_makes_no_number(self):
        lines = [line(1, 1000, train_loss=1.0), line(2, 1100, train_loss=math.nan)]
        assert math.isnan(sent(lines)[0].value)
        lines = [line(1, 1000, train_loss=math.inf), line(2, 1100, train_loss=-math.inf)]
        assert math.isnan(sent(lines)[0].value)

    def test_at_the_full_rate_are_sent_as_they_are(self):
        lines = [line(step, 5000 + 100 * step, train_loss=step / 7) for step in range(20)]
        assert [(point.step, point.value) for point in sent(lines, every_s=0)] == [(n, n / 7) for n in range(20)]


class TestOnce:
    def test_a_validation_between_steps_stays_as_it_is_and_in_its_place(self):
        lines = [
            line(1, 1000, train_loss=1.0),
            line(2, 1100, train_loss=3.0),
            line(2, 1200, val_map=0.5, val_loss=9.0),
            line(3, 1300, train_loss=7.0),
            line(3, 1400, val_map=0.25),  # two validations in one second
        ]
        assert [(point.key, point.step, point.value) for point in sent(lines)] == [
            ("train/loss", 2, 2.0),
            ("val/map", 2, 0.5),
            ("val/loss", 2, 9.0),
            ("train/loss", 3, 7.0),
            ("val/map", 3, 0.25),
        ]

    def test_what_is_said_once_at_the_end_is_no_mean(self):
        lines = [line(5, 1000, perf_latency=20.0), line(6, 1001, perf_latency=40.0)]
        assert [point.value for point in sent(lines)] == [20.0, 40.0]


def test_every_step_counts_in_one_point_whenever_and_however_often_it_is_cut():
    """The mean of a point times its steps, summed, is the sum of all steps: with any times, cuts and resends."""
    chance = random.Random(3)
    for _ in range(200):
        now, lines = 0, []
        for step in range(chance.randrange(1, 60)):
            now += chance.choice((0, 30, 100, 400, 2500)) - chance.choice((0, 0, 0, 200))  # a clock may go back
            lines.append(line(step, now, train_loss=chance.random()))
        received, held, rest = [], {}, lines
        while rest:
            cut = chance.randrange(1, len(rest) + 1)  # a close, a crash, or what fits in a call
            received += sent(rest[:cut], held=held)
            held = {"train/loss": received[-1].step}
            rest = rest[max(0, cut - chance.randrange(3)) :] if cut < len(rest) else []  # some of it comes again
        steps = [point.step for point in received]
        assert steps == sorted(set(steps)) and steps[-1] == len(lines) - 1
        before = -1
        for point in received:
            covered = [one.metrics["train/loss"] for one in lines[before + 1 : point.step + 1]]
            assert point.value == pytest.approx(sum(covered) / len(covered), rel=1e-12)
            before = point.step


def test_the_steps_of_this_moment_wait_for_their_like(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    journal = Journal(tmp_path)
    for step in range(4):
        journal.append({"train/loss": float(step)}, step)
        clock[0] += 0.3
    points, end = journal.unsent(every_s=1.0, last=False)
    assert [(point.step, point.value) for point in points] == [(3, 1.5)]  # the second has gone by
    journal.mark_sent(end)
    clock[0] = 102.0
    journal.append({"train/loss": 10.0}, 4)
    assert journal.unsent(every_s=1.0, last=False) == ([], end)
    journal.append({"val/map": 0.5}, 4)  # does not wait
    assert [point.key for point in journal.unsent(every_s=1.0, last=False)[0]] == ["train/loss", "val/map"]
    journal.mark_sent(journal.written)
    journal.append({"train/loss": 20.0}, 5)
    assert journal.unsent(every_s=1.0, last=False)[0] == []
    assert [point.value for point in journal.unsent(every_s=1.0, last=True)[0]] == [20.0]  # at the end


def test_the_full_rates_cost_is_said_once(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    said = []
    rate = FullRate(said.append)
    for _ in range(300):  # 10 steps a second, 15 metrics each, a millisecond in each call
        rate.add({f"train/{n}": 1.0 for n in range(15)}, 0.001)
        clock[0] += 0.1
    rate.tell()
    [text] = said
    assert "tracking.every_seconds=0" in text
    assert "151 points a second" in text  # 101 calls of 15 in ten seconds
    assert "at most 15 at one a second" in text
    assert "1.01 % of the training's time" in text
