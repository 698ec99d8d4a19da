"""What a leaderboard reads from a real store."""

import json

import pytest

from onestage.errors import InputError
from onestage.tracking import runs
from onestage.tracking.client import client
from onestage.tracking.leaderboard import entries


def training(store: str, experiment: str, name: str, *, tags: dict[str, str], **metrics: float) -> str:
    run_id = runs.open_run(store, experiment, name=name, tags=tags)
    for key, value in metrics.items():
        client(store).log_metric(run_id, key.replace("__", "/"), value)
    client(store).log_param(run_id, "detector._target_", "onestage.detectors.yolov3.YOLOv3")
    client(store).log_param(run_id, "cluster.num_workers", 4)
    runs.end_run(store, run_id, "FINISHED")
    return run_id


def test_the_best_stand_first_with_their_interval_and_cost(store: str) -> None:
    training(store, "board", "worse", tags={"dataset.hash": "a"}, best__map=0.4)
    best = training(
        store, "board", "better", tags={"dataset.hash": "a"},
        best__map=0.6, best__map_low=0.5, best__map_high=0.7, perf__latency_ms=12.5, epoch=8,
    )  # fmt: skip
    training(store, "board", "nothing yet", tags={})
    found = entries(store, "board")
    assert [one.name for one in found] == ["better", "worse", "nothing yet"]
    first = found[0]
    assert (first.run_id, first.score, first.low, first.high) == (best, 0.6, 0.5, 0.7)
    assert (first.latency_ms, first.epochs, first.detector, first.dataset_hash) == (12.5, 9, "YOLOv3", "a")
    assert first.started is not None and first.ended is not None and first.gpu_hours is not None
    assert first.gpu_hours == pytest.approx((first.ended - first.started) / 3600 * 4)


def test_a_sweep_is_its_trials(store: str) -> None:
    runs.open_run(store, "swept", name="night", tags={"onestage.sweep": "night"})
    point = {"detector": "ssd300", "optimizer.lr": 0.01}
    for number, score in enumerate(("0.25", "0.75")):
        tags = {"onestage.sweep": "night", "onestage.trial": str(number), "onestage.point": json.dumps(point)}
        tags |= {"onestage.score": score, "onestage.metric": "val/map_50", "onestage.state": "done"}
        training(store, "swept", f"night #{number}", tags=tags, best__map=float(score) / 2)
    training(store, "swept", "alone", tags={}, best__map=0.9)
    found = entries(store, "swept", sweep="night")
    assert [(one.trial, one.score, one.state, one.detector) for one in found] == [
        (1, 0.75, "done", "ssd300"),
        (0, 0.25, "done", "ssd300"),
    ]
    assert found[0].point == point
    everything = entries(store, "swept")  # without the parent, and by the number that all have
    assert [(one.name, one.score) for one in everything] == [("alone", 0.9), ("night #1", 0.375), ("night #0", 0.125)]


def test_where_the_score_is_a_loss_the_smallest_is_the_best(store: str) -> None:
    for number, score in enumerate(("12.5", "3.25")):
        tags = {"onestage.sweep": "low", "onestage.trial": str(number), "onestage.metric": "val/loss"}
        training(store, "losses", f"low #{number}", tags={**tags, "onestage.score": score}, best__map_low=0.1)
    found = entries(store, "losses", sweep="low")
    assert [(one.trial, one.score, one.low) for one in found] == [(1, 3.25, None), (0, 12.5, None)]


def test_a_wrong_name_is_told_the_nearest(store: str) -> None:
    training(store, "blood-cells", "one", tags={})
    with pytest.raises(InputError, match="did you mean 'blood-cells'"):
        entries(store, "blood-cell")
    with pytest.raises(InputError, match="no sweep 'night' in experiment 'blood-cells'"):
        entries(store, "blood-cells", sweep="night")


def test_a_sweeps_trials_are_not_the_last_training_to_go_on_with(store: str) -> None:
    alone = runs.open_run(store, "last", name="alone", tags={})
    runs.end_run(store, alone, "KILLED")
    trial = runs.open_run(store, "last", name="night #0", tags={"onestage.sweep": "night", "onestage.trial": "0"})
    runs.end_run(store, trial, "KILLED")
    assert runs.last_unfinished(store, "last") == alone


def test_a_reopened_run_forgets_why_it_had_ended(store: str) -> None:
    run_id = runs.open_run(store, "reopened", name="one", tags={})
    runs.end_run(store, run_id, "KILLED", "interrupted")
    runs.reopen_run(store, run_id)
    assert runs.REASON_TAG not in client(store).get_run(run_id).data.tags
    assert runs.end_if_running(store, run_id, "gone") and not runs.end_if_running(store, run_id, "gone")
    assert client(store).get_run(run_id).info.status == "KILLED"


def test_of_equal_scores_the_earlier_trial_stands_first(store: str) -> None:
    for number in (10, 9, 2):
        tags = {"onestage.sweep": "flat", "onestage.trial": str(number), "onestage.score": "0.0"}
        training(store, "flat", f"flat #{number}", tags=tags)
    assert [one.trial for one in entries(store, "flat", sweep="flat")] == [2, 9, 10]
