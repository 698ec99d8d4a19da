"""Spaces against counts and bounds worked out by hand."""

import math
import random
from collections import Counter
from typing import Any

import pytest
from hydra.errors import HydraException

from hydra_plugins.ray_tune_sweeper._space import Interval, Space, parse


def space(*arguments: str, present: dict[str, Any] | None = None, **search_space: Any) -> Space:
    return parse(arguments, search_space, present=(present or {}).get)


def test_a_grid_is_the_product_with_the_first_parameter_slowest() -> None:
    one = space("a=1,2", "fixed=x", "b=range(10,40,10)")
    lines = [one.overrides(point) for point in one.grid()]
    assert lines[:4] == [["a=1", "fixed=x", f"b={b}"] for b in (10, 20, 30)] + [["a=2", "fixed=x", "b=10"]]
    assert len(lines) == 6


def test_a_parameter_exists_under_its_choice_alone() -> None:
    one = space(
        "detector=ssd300,yolov3,retinanet",
        top_k={"values": [100, 200], "when": {"detector": "ssd300"}},
        anchors={"values": "3,9", "when": {"detector": ["yolov3", "ssd300"]}},
        deep={"values": [1, 2, 3], "when": {"top_k": 200}},
    )
    points = list(one.grid())
    assert len(points) == 2 * 1 + 2 * 3 + 2 + 1  # ssd300: top_k 100; 200 with deep; yolov3: anchors; retinanet
    assert {"detector": "retinanet"} in points
    assert all(("top_k" in point) == (point["detector"] == "ssd300") for point in points)
    drawn = [one.draw(0, i) for i in range(200)]
    assert all(("deep" in point) == (point.get("top_k") == "200") for point in drawn)
    assert sum("deep" in point for point in drawn) == pytest.approx(200 / 6, abs=20)


@pytest.mark.parametrize(("arguments", "exists"), [(["kind=a"], True), (["kind=b"], False), ([], False)])
def test_a_condition_may_be_on_a_fixed_value_or_on_the_configs_own(arguments: list[str], exists: bool) -> None:
    one = space(*arguments, present={"kind": "c"}, x={"values": [1, 2], "when": {"kind": "a"}})
    assert [parameter.key for parameter in one.parameters] == ["x"] * exists
    assert len(list(one.grid())) == (2 if exists else 1)
    assert "x" in [p.key for p in space(present={"kind": "c"}, x={"values": "1,2", "when": {"kind": "c"}}).parameters]


def test_the_command_line_has_the_last_word() -> None:
    assert space("lr=0.1", lr="interval(0,1)").overrides({}) == ["lr=0.1"]
    assert len(list(space("lr=1,2,3", lr=[7]).grid())) == 3


def test_overrides_are_spelt_so_that_hydra_reads_them_back() -> None:
    given = ["~gone", "+new=1,2", "db@backup=x,y", "list=[1,2],[3]", "text='a b',c"]
    one = space(*given, none="null,1", yaml=["a,b", True])
    first = next(iter(one.grid()))
    lines = one.overrides(first)
    assert "~gone" in lines and "+new=1" in lines and "db@backup=x" in lines and "list=[1,2]" in lines
    again = parse(lines, {})
    assert again.parameters == () and again.overrides({}) == lines
    assert {"text='a b'", "none=null", "yaml=a\\,b"} <= set(lines)


def test_intervals_keep_their_bounds_and_whole_ones_reach_their_ends() -> None:
    one = space("a=interval(-1,3)", "b=int(interval(1,3))", "c=tag(log,int(interval(1,100)))")
    points = [one.draw(1, i) for i in range(3000)]
    assert all(-1 <= float(point["a"]) < 3 for point in points)
    counts = Counter(point["b"] for point in points)
    assert set(counts) == {1, 2, 3} and all(isinstance(value, int) for value in counts)
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())
    assert {min(point["c"] for point in points), max(point["c"] for point in points)} == {1, 100}


def test_a_logarithmic_interval_is_uniform_in_its_logarithm() -> None:
    one = space("lr=tag(log,interval(1e-4,1e-1))")
    decades = Counter(math.floor(math.log10(float(one.draw(3, i)["lr"]))) for i in range(3000))
    assert set(decades) == {-4, -3, -2}
    assert all(count == pytest.approx(1000, abs=120) for count in decades.values())


def test_a_draw_depends_on_seed_number_and_its_own_parameter_alone() -> None:
    one, more = space("a=interval(0,1)", "b=1,2,3"), space("z=interval(0,1)", "b=1,2,3", "a=interval(0,1)")
    assert one.draw(0, 7) == one.draw(0, 7)
    assert len({tuple(one.draw(seed, i).values()) for seed in (0, 1) for i in range(5)}) == 10
    assert {key: more.draw(0, 7)[key] for key in ("a", "b")} == one.draw(0, 7)


def test_of_rising_numbers_that_someone_chose_every_one_is_probed() -> None:
    assert [point["size"] for point in space("size=2,2.5,8").probes()] == ["2", "2.5", "8"]


def test_probes_hold_every_choice_and_the_ends_of_what_has_an_order() -> None:
    one = space(
        "kind=a,b,c", "n=range(0,100)", lr={"values": "interval(1,2)", "when": {"sub": 5}},
        sub={"values": [4, 5], "when": {"kind": "c"}},
    )  # fmt: skip
    probes = one.probes()
    assert {point["kind"] for point in probes} == {"a", "b", "c"}
    assert {point["n"] for point in probes} == {"0", "99"}
    assert {point["lr"] for point in probes if "lr" in point} == {1.0, 2.0}
    assert len(probes) <= 8


def test_a_shuffle_is_the_seeds_own() -> None:
    orders = [[point["a"] for point in parse(["a=shuffle(range(0,8))"], {}, seed=seed).grid()] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list("01234567") != orders[0]


def test_perturbing_changes_numbers_of_intervals_by_a_fifth_within_bounds() -> None:
    one = space("a=interval(1,2)", "b=int(interval(1,50))", "c=x,y")
    changed = [one.perturb({"a": 1.5, "b": 40, "c": "x"}, random.Random(i), 0.0) for i in range(20)]
    assert {round(float(point["a"]), 9) for point in changed} == {1.2, 1.8}
    assert {point["b"] for point in changed} == {32, 48} and {point["c"] for point in changed} == {"x"}
    assert one.perturb({"a": 1.9, "b": 50, "c": "x"}, random.Random(0), 0.0)["a"] in (2.0, pytest.approx(1.52))
    assert len({one.perturb({"a": 1.5}, random.Random(i), 1.0)["a"] for i in range(20)}) == 20


def test_what_is_near_is_known_for_rising_numbers_alone() -> None:
    ordered = {p.key: getattr(p.domain, "ordered", None) for p in space("a=1,2,4", "b=2,1,4", "c=x,y,z").parameters}
    assert ordered == {"a": True, "b": False, "c": False}
    assert Interval(0.0, 1.0, False, False).within(2.0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "search_space", "says"),
    [
        (["a=interval(3,1)"], {}, "low < high, got 3.0 and 1.0"),
        (["a=interval(1,1)"], {}, "low < high"),
        (["a=tag(log,interval(0,1))"], {}, "above 0"),
        (["a=tag(log,range(1,5))"], {}, "for an interval"),
        (["a=range(5,5)"], {}, "empty"),
        ([], {"a": []}, "empty"),
        ([], {"a": {"value": 1}}, "give values"),
        (["b=1,2"], {"a": {"values": "3,4", "when": {"b": 3}}}, "it only has 1, 2"),
        (["b=interval(0,1)"], {"a": {"values": "3,4", "when": {"b": 1}}}, "'b' is an interval"),
        ([], {"a": {"values": "1,2", "when": {"b": 1}}, "b": {"values": "1,2", "when": {"a": 1}}}, "circle: a, b"),
    ],
)
def test_what_can_not_be_is_refused(arguments: list[str], search_space: dict[str, Any], says: str) -> None:
    with pytest.raises(HydraException, match=says):
        parse(arguments, search_space)


def test_a_grid_over_an_interval_is_refused() -> None:
    with pytest.raises(HydraException, match="can't list the interval of 'lr'"):
        list(space("lr=interval(0,1)").grid())
