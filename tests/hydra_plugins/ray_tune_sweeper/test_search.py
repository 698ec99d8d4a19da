import statistics
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from hydra_plugins.ray_tune_sweeper._journal import Journal, Trial
from hydra_plugins.ray_tune_sweeper._search import Search, Strategy, grid, tpe, uniform
from hydra_plugins.ray_tune_sweeper._space import Point, Space, parse

KINDS = parse(["kind=a,b"], {"x": {"values": "interval(0,1)", "when": {"kind": "a"}}, "n": "1,2,4,8"})


def cost(point: Point) -> float:
    """Least at kind a, x 0.3, n 4."""
    return (float(point["x"]) - 0.3) ** 2 + 0.1 * (point["n"] != "4") if point["kind"] == "a" else 1.0


def proposed(strategy: Strategy, count: int, known: list[Trial]) -> list[Trial]:
    """``known`` with the strategy's further trials, one at a time, each done with its cost."""
    known = list(known)
    for number in range(len(known), count):
        point = strategy(number, known)
        assert point is not None
        known.append(Trial(number, point, [], "done", value=cost(point)))
    return known


def optuna(space: Space = KINDS, seed: int = 0) -> Strategy:
    return tpe(space, seed, maximize=False, time_attr="training_iteration", metric="loss")


def test_a_grid_ends() -> None:
    strategy = grid(parse(["a=1,2", "b=3,4"], {}))
    assert [strategy(i, []) for i in range(5)] == [
        *({"a": a, "b": b} for a in ("1", "2") for b in ("3", "4")),
        None,
    ]


def test_random_goes_on_where_it_was() -> None:
    whole = proposed(uniform(KINDS, 5), 6, [])
    assert proposed(uniform(KINDS, 5), 6, whole[:3]) == whole


def test_optuna_repeats_and_goes_on_exactly_from_what_is_known() -> None:
    whole = proposed(optuna(), 20, [])
    assert proposed(optuna(), 20, []) == whole
    assert proposed(optuna(), 20, whole[:12]) == whole
    assert proposed(optuna(seed=1), 3, []) != whole[:3]
    assert all(("x" in trial.point) == (trial.point["kind"] == "a") for trial in whole)


def test_optuna_learns() -> None:
    later = [cost(trial.point) for trial in proposed(optuna(), 40, [])[20:]]
    drawn = [cost(KINDS.draw(0, i)) for i in range(20)]
    assert statistics.median(later) < statistics.median(drawn) / 3


def test_optuna_takes_trials_of_every_state() -> None:
    results: list[dict[str, Any]] = [{"training_iteration": 1, "loss": 2.0}, {"training_iteration": 2, "other": 1}]
    point: Point = {"kind": "a", "x": 0.5, "n": "2"}
    known = [
        Trial(0, point, [], "stopped", results, value=2.0),
        Trial(1, point, [], "unfinished", results),
        Trial(2, point, [], "failed", reason="nan"),
        Trial(3, point, [], "lost"),
        Trial(4, point, [], "done", value=None),
    ]
    assert set(optuna()(5, known) or {}) >= {"kind", "n"}


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Journal.open(tmp_path)
    yield journal
    journal.close()


def test_unfinished_trials_come_first_and_again_as_they_were(journal: Journal) -> None:
    space = parse(["a=1,2,3"], {})

    def search() -> Search:
        return Search(journal, grid(space), trials=None, space=space, suggestion=lambda n, point: {"of": n, **point})

    first = search()
    assert [first.suggest(str(i)) for i in range(3)] == [{"of": i, "a": str(i + 1)} for i in range(3)]
    assert first.suggest("3") is None  # whoever runs may be lost yet
    journal.add("end", trial=0, state="done", value=1.0)
    journal.add("end", trial=1, state="lost", reason="its node")
    second = search()
    assert [second.suggest("a"), second.suggest("b")] == [{"of": 1, "a": "2"}, {"of": 2, "a": "3"}]
    journal.add("end", trial=1, state="failed", reason="nan")
    journal.add("end", trial=2, state="stopped", value=1.0)
    assert second.suggest("c") == Searcher.FINISHED == search().suggest("d")


def test_no_more_than_so_many_trials(journal: Journal) -> None:
    search = Search(journal, uniform(KINDS, 0), trials=2, space=KINDS, suggestion=lambda n, point: {"of": n})
    assert [search.suggest("a"), search.suggest("b"), search.suggest("c")] == [{"of": 0}, {"of": 1}, None]
