"""A training over several hosts, each in a network namespace of its own, that survives whatever happens to them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from onestage.bench import chaos
from onestage.bench.chaos import Harm

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
    pytest.mark.skipif(not BCCD.is_dir(), reason="needs the photographs of ../shared/data/bccd"),
]


class Survived(NamedTuple):
    """What the harms cost, the report at the end, and the run's history."""

    harms: dict[str, Harm]
    report: dict[str, Any]
    events: list[dict[str, Any]]
    num_images: int


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survived]:
    """One training of yolov3_tiny on photographs, two hosts at first, that suffers each kind of harm once."""
    from onestage.cli import main
    from onestage.data.manifest import Manifest

    folder = tmp_path_factory.mktemp("hosts")
    assert main(["data", "import", "voc", str(BCCD), "--out", str(folder / "bccd")]) == 0
    with chaos.rigged(folder / "rig", data=folder / "bccd", seed=7, name="hosts", say=print) as rig:
        harms = {kind: strike(rig) for kind, strike in chaos.KINDS.items()}
        report = chaos.report(rig, list(harms.values()), steps=rig.finish())
        print(chaos.markdown(report))
        num_images = Manifest.load(folder / "bccd").split("train").num_samples
        yield Survived(harms, report, rig.events(), num_images)


@pytest.mark.parametrize("kind", list(chaos.KINDS))
def test_each_harm_costs_no_more_than_what_was_not_yet_saved(survived: Survived, kind: str) -> None:
    """A checkpoint is taken every ten steps, and one more may be on its way to the disk."""
    assert survived.harms[kind].lost_steps <= 20


def test_a_host_that_joins_costs_nothing(survived: Survived) -> None:
    """The group saves before it goes on with more workers."""
    assert survived.harms["join"].lost_steps == 0
    assert max(event["workers"] for event in survived.events if event["event"] == "started") == 3


@pytest.mark.parametrize(
    ("kind", "told"), [("sigterm", "its process got SIGTERM"), ("drain", "its node is being drained")]
)
def test_a_worker_that_has_to_go_costs_no_step(survived: Survived, kind: str, told: str) -> None:
    assert survived.harms[kind].lost_steps == 0
    lost = [event["why"] for event in survived.events if event["event"] == "lost"]
    assert len([why for why in lost if told in why and "stopped with a checkpoint" in why]) == 1


def test_the_training_goes_on_with_fewer_workers_and_grows_again(survived: Survived) -> None:
    sizes = [event["workers"] for event in survived.events if event["event"] == "started"]
    assert 1 in sizes and sizes[-1] == 3


def test_the_steps_of_all_groups_are_of_the_same_images(survived: Survived) -> None:
    assert {event["global_batch"] for event in survived.events if event["event"] == "started"} == {chaos.GLOBAL_BATCH}


def test_the_run_ends_finished_with_the_right_number_of_images(survived: Survived) -> None:
    assert survived.report["status"] == "FINISHED"
    assert survived.report["global_step"] == survived.report["steps"]
    steps_per_epoch = -(-survived.num_images // chaos.GLOBAL_BATCH)  # the last of an epoch takes what is left
    epochs, steps = divmod(survived.report["steps"], steps_per_epoch)
    assert survived.report["images_seen"] == epochs * survived.num_images + steps * chaos.GLOBAL_BATCH


def test_each_step_is_logged_once(survived: Survived) -> None:
    assert survived.report["logged_twice"] == []
    assert survived.report["not_logged"] == []


def test_the_history_says_what_happened(survived: Survived) -> None:
    lost = [event["why"] for event in survived.events if event["event"] == "lost"]
    assert len(lost) >= 3, "a worker, a node, a link"
    assert [event["event"] for event in survived.events].count("preempted") == 1
    assert survived.events[-1]["event"] == "finished"
