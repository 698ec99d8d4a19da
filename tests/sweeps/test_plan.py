"""What a sweep would do, and what is refused before anything starts."""

from pathlib import Path

import pytest

from onestage.config.folder import options
from onestage.errors import InputError
from onestage.sweeps.plan import expected_epochs, plan

TEN = ["budget.trials=10"]


def of(digits: Path, *overrides: str) -> list[str]:
    return [f"data.root={digits}", "tracking=none", *overrides]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=1"], "nothing varies"),
        (["optimizer.lrr=1e-3,1e-4"], "'optimizer.lrr'; the nearest is 'optimizer.lr'"),
        (["detector.widht=0.5,1.0"], "the nearest is 'detector.width'"),
        (["detector=yolov3,yolov9"], "no detector 'yolov9'"),
        (["detector.width=wide,narrow"], "detector.width must be a number"),
        (["optimizer.lr=interval(2,1)"], "low < high"),
        (["optimizer.lr=tag(log,interval(0,1))"], "above 0"),
        (["seed=1,2", "cluster=none"], "run on Ray"),
        (["seed=1,2", "resume=last"], "onestage sweep resume NAME"),
        (["cluster.num_workers=1,2"], "one for all trials"),
        (["data.root=a,b"], "one for all trials"),
        (["seed=1,2", "sweep.search=bayes"], "grid, random, optuna"),
        (["seed=1,2", "sweep.scheduler=hyperband"], "none, asha, median, pbt"),
        (["seed=1,2", "sweep.metric=val/maap"], "never reported"),
        (["seed=1,2", "sweep.metric=val/loss"], "sweep.direction=minimize"),
        (["seed=1,2", "sweep.direction=minimize"], "sweep.direction=maximize"),
        (["seed=1,2", "budget.hours=0"], "more than 0"),
        (["optimizer.lr=interval(0.1,0.2)"], "random search has no end: give budget.trials"),
        (["optimizer.lr=interval(0.1,0.2)", "sweep.search=grid"], "can't list the interval of optimizer.lr"),
        (["seed=1,2", "sweep.scheduler=pbt"], "nothing here is one"),
        (
            ["optimizer.lr=interval(0.1,0.2)", "sweep.scheduler=pbt", "sweep.search=optuna", *TEN],
            "take sweep.search=random",
        ),
        (["seed=1,2", "sweep.scheduler=asha", "trainer.max_epochs=2"], "sweep.asha.grace_epochs=3 is beyond trainer."),
        (["seed=1,2", "sweep.scheduler=asha", "sweep.asha.reduction=1"], "reduction > 1"),
        (["seed=1,2", "name=night"], "sweep.name=… names the sweep"),
        (["seed=1,2", "sweep.max_concurrent=0"], "at least 1"),
        (["seed=1,2", "sweep.name=../../x"], "letters, digits"),
        (["seed=1,2", "sweep.name='a,b'"], "letters, digits"),
        (["data.batch_size=2,2.5,8"], "data.batch_size"),
        (["seed=1,2", "on_oom=pray"], "fail or shrink"),
        (["seed=1,2", "data.batch_size=0"], "data.batch_size must be at least 1"),
    ],
)
def test_refused_in_one_line(digits: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError) as refused:
        plan([*of(digits), *overrides])
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name in options("sweep") if name != "default"])
def test_every_ready_space_composes_whole(digits: Path, name: str) -> None:
    """Each choice of it is composed and checked; all its detectors are told apart by their own keys."""
    made = plan(of(digits, f"sweep={name}", "budget.trials=5"))
    assert made.search == "random" and made.trials == 5 and made.settings["scheduler"] == "asha"
    keys = {parameter.key for parameter in made.space.parameters}
    assert "optimizer.lr" in keys
    families = {probe["detector"]["_target_"].rpartition(".")[2] for probe in made.probes}
    wanted = {"all_detectors": 6, "imbalance": 3, "fusion": 4, "lr": 1}[name]
    assert len(families) == wanted


def test_a_condition_holds_in_every_trial(digits: Path) -> None:
    made = plan(of(digits, "sweep=imbalance", "budget.trials=60"))
    for point in made.points() or []:
        chosen = next(one for one in point if one.startswith("detector="))
        assert ("detector.negatives_per_positive" in " ".join(point)) == (chosen == "detector=ssd300")
        assert ("detector.focal_gamma" in " ".join(point)) == (chosen == "detector=yolov3")


def test_a_grid_is_all_of_it_unless_the_budget_is_smaller(digits: Path) -> None:
    assert plan(of(digits, "seed=1,2,3", "optimizer.lr=1e-3,1e-4")).trials == 6
    assert plan(of(digits, "seed=range(10)", "budget.trials=4")).trials == 4
    assert plan(of(digits, "optimizer.lr=interval(1e-4,1e-3)", "budget.hours=1")).trials is None


def test_the_same_seed_draws_the_same_trials(digits: Path) -> None:
    drawn = [
        plan(of(digits, "optimizer.lr=tag(log,interval(1e-4,1e-1))", "budget.trials=5", f"seed={seed}")).points()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] and drawn[1] != drawn[2]


def test_epochs_by_hand(digits: Path) -> None:
    """Nine epochs, rungs at 1 and 3, a third goes on: 1 for all, 2 more for a third, 6 more for a ninth."""
    assert expected_epochs(9, 1, 3) == pytest.approx(1 + 2 / 3 + 6 / 9)
    assert expected_epochs(5, 8, 3) == 5  # no rung below the end
    asha = ["sweep.scheduler=asha", "sweep.asha.grace_epochs=1", "trainer.max_epochs=9"]
    assert plan(of(digits, "seed=1,2,3", *asha)).epochs() == (27, pytest.approx(3 * 7 / 3))
    assert plan(of(digits, "seed=1,2,3", "trainer.max_epochs=9")).epochs() == (27, 27)
