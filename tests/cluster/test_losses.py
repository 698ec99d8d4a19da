"""What a training with notice of its end keeps, and what it goes on from without its head: on one cluster, one run."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from onestage.bench import chaos
from onestage.bench.chaos import Harm, Rig
from onestage.cluster import local_cluster
from onestage.cluster.local_cluster import HEAD
from onestage.data.scenes import draw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Losses(Rig):
    """Each of these returns when the training is at work again on all nodes."""

    def sigterm(self) -> Harm:
        """SIGTERM for one training process, as to a pod that is ended with a grace period."""
        return self._harm("sigterm", self.hosts[0], lambda: self._workers(self.hosts[0])[0].send_signal(signal.SIGTERM))

    def drain(self) -> Harm:
        """A node is drained, as before a preemption; Ray ends it once nothing runs there, and it comes back later."""
        host = self.hosts[1]

        def strike() -> None:
            node = self.cluster._node_id(self.cluster.host(host))
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", str(node)]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted back"]
            command += ["--address", self.cluster.address, "--deadline-remaining-seconds", "120"]
            subprocess.run(command, env=os.environ | self.cluster.environment, check=True, timeout=60)
            self._wait(lambda: not self._alive(host), f"Ray to end the drained {host}")
            self._wait(lambda: self.events()[-1]["event"] == "resumed", "the training to go on without it")
            self.cluster.start_node(host)

        return self._harm("drain", host, strike)

    def head(self) -> Harm:
        """SIGKILL for the head's processes, whose driver goes with them; it is started again a little later."""

        def strike() -> None:
            self.cluster.kill_node(HEAD)
            time.sleep(chaos.AWAY_S)
            self.cluster.restart_head()

        return self._harm("head", "", strike)


class Survived(NamedTuple):
    """What each loss cost, the run at its end, its history, and what the user saw."""

    harms: dict[str, Harm]
    report: dict[str, Any]
    events: list[dict[str, Any]]
    log: str


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survived]:
    folder = tmp_path_factory.mktemp("losses")
    draw(folder / "scenes", seed=1, num_train=200, num_val=8, num_test=1, size=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(folder / "cache"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            patch.setattr(chaos, "TRACKER_PORT", probe.getsockname()[1])
        cluster = local_cluster.up("losses", workers=2)
        rig = Losses(folder, data=folder / "scenes", cluster=cluster, draw=random.Random(7), say=print)
        try:
            rig.start_tracker()
            rig.train()
            harms = {harm.kind: harm for harm in (rig.sigterm(), rig.drain(), rig.head())}
            report = chaos.report(rig, list(harms.values()), steps=rig.finish())
            print(chaos.markdown(report))
            yield Survived(harms, report, rig.events(), (folder / "train.log").read_text())
        finally:
            rig.end()
            cluster.down()


def lost(survived: Survived) -> list[str]:
    return [event["why"] for event in survived.events if event["event"] == "lost"]


@pytest.mark.parametrize(
    ("kind", "told"), [("sigterm", "its process got SIGTERM"), ("drain", "its node is being drained")]
)
def test_a_worker_that_has_to_go_costs_no_step(survived: Survived, kind: str, told: str) -> None:
    assert survived.harms[kind].lost_steps == 0
    assert len([why for why in lost(survived) if told in why and "stopped with a checkpoint" in why]) == 1


def test_without_the_drained_node_it_goes_on_and_grows_again(survived: Survived) -> None:
    sizes = [event["workers"] for event in survived.events if event["event"] == "started"]
    assert 1 in sizes and sizes[-1] == 2


def test_a_lost_head_costs_no_more_than_what_was_not_yet_saved(survived: Survived) -> None:
    """A checkpoint is taken every ten steps, and one more may be on its way to the disk."""
    assert survived.harms["head"].lost_steps <= 20
    assert any(why.startswith("the driver") for why in lost(survived))


def test_sigterm_to_the_command_costs_no_step_and_a_resume_goes_on_from_it(survived: Survived) -> None:
    (place,) = (number for number, event in enumerate(survived.events) if event["event"] == "preempted")
    resumed = [event for event in survived.events[place:] if event["event"] == "resumed"]
    assert [event["lost_steps"] for event in resumed] == [0]
    assert resumed[0]["step"] >= survived.events[place]["step"]


def test_the_same_run_ends_finished_with_every_step_logged_once(survived: Survived) -> None:
    assert survived.report["status"] == "FINISHED"
    assert survived.report["global_step"] == survived.report["steps"]
    assert survived.report["logged_twice"] == survived.report["not_logged"] == []
