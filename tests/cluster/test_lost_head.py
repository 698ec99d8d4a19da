"""A training whose cluster loses its head, and with it the driver: the command that was started outlives both."""

import random
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from onestage.bench import chaos
from onestage.bench.chaos import Harm, Rig
from onestage.cluster import local_cluster
from onestage.cluster.local_cluster import HEAD
from onestage.data.scenes import draw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class LosesHead(Rig):
    """On nodes that share this machine's network, where the head is not the host of the command and the tracker."""

    def head(self) -> Harm:
        """SIGKILL for the head's processes; it is started again a little later, with what it had stored."""

        def strike() -> None:
            self.cluster.kill_node(HEAD)
            time.sleep(chaos.AWAY_S)
            self.cluster.restart_head()

        return self._harm("head", "", strike)


class Survived(NamedTuple):
    """What the loss cost, the run at its end, and its history."""

    harm: Harm
    report: dict[str, Any]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survived]:
    folder = tmp_path_factory.mktemp("head")
    draw(folder / "scenes", seed=1, num_train=200, num_val=8, num_test=1, size=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(folder / "cache"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            patch.setattr(chaos, "TRACKER_PORT", probe.getsockname()[1])
        cluster = local_cluster.up("losthead", workers=2)
        rig = LosesHead(folder, data=folder / "scenes", cluster=cluster, draw=random.Random(7), say=print)
        try:
            rig.start_tracker()
            rig.train()
            harm = rig.head()
            report = chaos.report(rig, [harm], steps=rig.finish())
            print(chaos.markdown(report))
            yield Survived(harm, report, rig.events())
        finally:
            rig.end()
            cluster.down()


def test_it_costs_no_more_than_what_was_not_yet_saved(survived: Survived) -> None:
    """A checkpoint is taken every ten steps, and one more may be on its way to the disk."""
    assert survived.harm.lost_steps <= 20
    assert any(event["event"] == "lost" and event["why"].startswith("the driver") for event in survived.events)


def test_sigterm_to_the_command_costs_no_step_and_a_resume_goes_on_from_it(survived: Survived) -> None:
    (place,) = (number for number, event in enumerate(survived.events) if event["event"] == "preempted")
    resumed = [event for event in survived.events[place:] if event["event"] == "resumed"]
    assert [event["lost_steps"] for event in resumed] == [0]
    assert resumed[0]["step"] >= survived.events[place]["step"]


def test_the_same_run_ends_finished_with_every_step_logged_once(survived: Survived) -> None:
    assert survived.report["status"] == "FINISHED"
    assert survived.report["global_step"] == survived.report["steps"]
    assert survived.report["logged_twice"] == survived.report["not_logged"] == []
