import pytest

from hydra_plugins.ray_tune_sweeper._cluster import named, room

BIG, SMALL = {"CPU": 8.0, "GPU": 4.0, "memory": 64.0}, {"CPU": 2.0, "memory": 8.0}


@pytest.mark.parametrize(
    ("nodes", "bundles", "count"),
    [
        ([SMALL, SMALL], [{"CPU": 1}], 4),
        ([SMALL, SMALL], [{"CPU": 1.5}], 2),  # a bundle lies on one node: not 4 / 1.5
        ([SMALL, SMALL], [{"CPU": 3}], 0),
        ([BIG, SMALL], [{"CPU": 1, "GPU": 1}], 4),
        ([BIG, SMALL], [{"CPU": 0, "memory": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}], 2),
        ([SMALL, SMALL], [{"CPU": 1}, {"CPU": 2}], 1),  # the small bundle mustn't break the big one's node
        ([SMALL], [{"TPU": 1}], 0),
        ([], [{"CPU": 1}], 0),
        ([{"CPU": 1.0}], [{"CPU": 0.1}], 10),  # not 9, for 1 - 10 × 0.1 isn't 0 in floats
    ],
)
def test_as_many_trials_as_fit(nodes: list[dict[str, float]], bundles: list[dict[str, float]], count: int) -> None:
    assert room(nodes, bundles) == count


def test_resources_are_named_as_one_says_them() -> None:
    assert named({"CPU": 2.0, "GPU": 0.5, "memory": 0, "node:10.0.0.1": 1.0}) == "2 CPU, 0.5 GPU"
    assert named({"memory": 12 * 2.0**30}) == "12 GiB of memory" and named({}) == "nothing"
    assert named({"memory": 2.0**30, "CPU": 2.0, "GPU": 1.0}) == "2 CPU, 1 GPU, 1 GiB of memory"  # whatever the order
