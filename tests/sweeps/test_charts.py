"""What the pictures draw, by their data; and importances of a function whose answer is known."""

import random
from pathlib import Path

import pytest
from PIL import Image

from onestage.sweeps.charts import Column, draw, front_of, importances, pareto, trials
from onestage.tracking.leaderboard import Entry


def entry(number: int, score: float | None, **more: object) -> Entry:
    state = "failed" if score is None else "done"
    defaults = {"started": 3600.0 * number, "ended": 3600.0 * (number + 1), "trial": number, "state": state}
    settings: dict[str, object] = {
        "run_id": f"{number}", "name": f"s #{number}", "status": "FINISHED", "detector": "ssd300",
        "dataset_hash": None, "score": score, "point": {"optimizer.lr": 0.001 * (number + 1)}, **defaults, **more,
    }  # fmt: skip
    return Entry(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [[], [None], [0.5], [0.5, 0.5, 0.5, 0.5, 0.5], [None, 0.1, 0.4, 0.2, 0.3, None]])
def test_four_pictures_of_any_sweep(tmp_path: Path, scores: list[float | None]) -> None:
    files = draw([entry(i, score) for i, score in enumerate(scores)], tmp_path, metric="val/map", maximize=True)
    assert [file.stem for file in files] == ["trials", "parallel", "importance", "pareto"]
    for file in files:
        with Image.open(file) as picture:
            assert picture.width > 300 and picture.height > 150


@pytest.mark.parametrize(("sign", "best"), [(1, [0.2, 0.2, 0.5, 0.5]), (-1, [0.2, 0.1, 0.1, 0.1])])
def test_the_best_so_far_is_a_step_line(sign: int, best: list[float]) -> None:
    figure = trials([entry(i, score) for i, score in enumerate([0.2, 0.1, 0.5])], metric="val/map", sign=sign)
    line = next(one for one in figure.axes[0].lines if one.get_label() == "best so far")
    assert list(line.get_xdata()) == [1.0, 2.0, 3.0, 3.0]
    assert list(line.get_ydata()) == pytest.approx(best)


def test_a_column_is_logarithmic_where_its_values_are() -> None:
    assert Column("lr", [0.001, 0.01, 0.1]).places == pytest.approx([0.0, 0.5, 1.0])
    assert Column("momentum", [0.8, 0.85, 0.9]).places == pytest.approx([0.0, 0.5, 1.0])
    assert Column("kind", ["b", "a", "c"]).places == pytest.approx([0.5, 0.0, 1.0])


def test_a_parameter_that_a_trial_has_not_lies_below_the_others() -> None:
    column = Column("ratio", ["1", None, "6"])
    assert column.places[1] == 0.0 and 0.0 < column.places[0] < column.places[2] == 1.0
    assert column.ticks[0] == (0.0, "–")


def test_nothing_beats_the_front_in_both() -> None:
    points = [(0.5, 3.0), (0.4, 1.0), (0.3, 2.0), (0.5, 4.0), (0.6, 9.0), (0.4, 1.0)]
    front = front_of(points)
    assert [points[i] for i in front] == [(0.4, 1.0), (0.5, 3.0), (0.6, 9.0)]
    for score, cost in points:
        assert any(points[i][0] >= score and points[i][1] <= cost for i in front)


def test_the_pareto_panels_name_what_is_missing() -> None:
    figure = pareto([entry(0, 0.3, gpu_hours=1.0)], metric="val/map", sign=1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no trial with milliseconds an image"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["#0"]


def test_the_parameter_that_makes_the_score_is_the_important_one() -> None:
    rng = random.Random(0)
    found = []
    for number in range(40):
        lr, decay, kind = 10 ** rng.uniform(-4, -1), rng.random(), rng.choice(["a", "b"])
        point = {"lr": lr, "decay": decay, "kind": kind, **({"only": 1.0} if kind == "a" else {})}
        found.append(entry(number, lr * 5 + 0.001 * decay, point=point))
    shares = importances(found)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert next(iter(shares)) == "lr" and shares["lr"] > 0.9
    assert "only" not in shares  # not all trials have it


def test_too_few_trials_tell_nothing() -> None:
    assert importances([entry(i, 0.1 * i) for i in range(3)]) == {}
    assert importances([entry(i, 0.5) for i in range(9)]) == {}
