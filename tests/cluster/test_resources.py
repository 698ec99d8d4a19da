"""The wait for workers, with a clock of its own: what is said meanwhile, how long it lasts, what it settles for."""

import pytest

from onestage.cluster.resources import Node, TooFewResources, num_fitting, of_worker, wait_for_workers


def cluster(**changed: object) -> dict[str, object]:
    return {"num_workers": 3, "min_workers": None, "cpus_per_worker": 2, "gpus_per_worker": 0.0, "wait": 1.0} | changed


def node(free: float, total: float = 4.0, **others: float) -> Node:
    return Node("host", {"CPU": total, **others}, {"CPU": free, **others})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait(settings: dict[str, object], states: list[list[Node]]) -> tuple[int, list[str], float]:
    """Each poll sees the next state, and the last one from then on."""
    clock, said = Clock(), []
    seen = iter(states)
    last = states[-1]
    workers = wait_for_workers(
        settings, nodes=lambda: next(seen, last), say=said.append, clock=clock, sleep=clock.sleep
    )
    return workers, said, clock.now


def test_a_worker_is_not_split_over_two_nodes() -> None:
    assert num_fitting([node(3.0), node(3.0)], {"CPU": 2.0}) == 2


def test_the_scarcest_resource_counts() -> None:
    assert num_fitting([node(4.0, GPU=1.0)], {"CPU": 1.0, "GPU": 1.0}) == 1
    assert num_fitting([node(4.0)], {"CPU": 1.0, "GPU": 1.0}) == 0
    assert of_worker(cluster(gpus_per_worker=0.5)) == {"CPU": 2, "GPU": 0.5}


def test_a_cluster_with_room_starts_at_once() -> None:
    assert wait(cluster(), [[node(4.0), node(4.0)]]) == (3, [], 0.0)


def test_the_wait_says_what_is_asked_and_what_is_there_and_ends_with_the_nodes() -> None:
    workers, said, waited = wait(cluster(), [[node(2.0)], [node(2.0), node(1.0, total=4.0)], [node(4.0), node(2.0)]])
    assert (workers, waited) == (3, 2.0)
    assert said[0] == (
        "asked for 3 workers of 2 CPU each, 1 fit: 1 nodes have 2 of 4 CPU free, and even empty they hold fewer: "
        "lower cluster.num_workers or cluster.cpus_per_worker, or add nodes; waiting 0 s of 60 s"
    )
    assert "even empty" not in said[1], "two nodes of four CPUs would do, once they are free"


def test_the_wait_has_an_end() -> None:
    with pytest.raises(TooFewResources, match=r"asked for 3 workers .* waited 60 s \(cluster.wait=1 minutes\)"):
        wait(cluster(), [[node(2.0)]])


def test_an_elastic_training_takes_what_there_is() -> None:
    assert wait(cluster(min_workers=1), [[node(4.0)]]) == (2, [], 0.0)


def test_an_elastic_training_waits_ten_seconds_for_what_is_taken() -> None:
    workers, said, waited = wait(cluster(min_workers=1), [[node(2.0)]])
    assert (workers, waited) == (1, 10.0)
    assert said[0].startswith("asked for 1 to 3 workers")


def test_an_elastic_training_takes_all_it_wants_where_they_come_in_time() -> None:
    workers, _, waited = wait(cluster(min_workers=1), [[node(2.0)]] * 4 + [[node(4.0), node(4.0)]])
    assert (workers, waited) == (3, 4.0)


def test_an_elastic_training_waits_too_where_not_even_the_least_fit() -> None:
    with pytest.raises(TooFewResources, match="0 fit"):
        wait(cluster(min_workers=2), [[node(1.0)]])
