"""Harm at random to a training on several hosts, and what each harm cost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from onestage.cluster import local_cluster
from onestage.cluster.local_cluster import HEAD, LocalCluster
from onestage.data.scenes import draw
from onestage.errors import PREEMPTED, InputError

WAIT_S: Final = 300.0
"""So long the training may take to go on after any harm."""
AWAY_S: Final = 5.0
TRACKER_AWAY_S: Final = 60.0
DRAINED_IN_S: Final = 120
TRACKER_PORT: Final = 5000
LAST_STEPS: Final = 30
GLOBAL_BATCH: Final = 24
POLL_S: Final = 0.5

# A small network on small images: what is measured is the way back, not the training.
TRAINING: Final = (
    "detector=yolov3_tiny",
    "detector.width=0.125",
    "detector.input_size=[96,96]",
    "augment=none",
    "data.batch_size=4",
    "data.num_workers=0",
    "trainer.max_epochs=100000",
    "trainer.val_every_epochs=20",
    "trainer.num_pictures=0",
    "checkpoint.every_steps=10",
    "cluster=ray",
    "cluster.ship=false",
    "cluster.cpus_per_worker=1",
    "cluster.backoff_s=1",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Harm:
    """One harm, and what it cost: steps trained again, and seconds from the last step before to the next one."""

    kind: str
    what: str
    lost_steps: int
    recovery_s: float


class Rig:
    """A cluster of ``nodes`` hosts beside its head, a tracking server, and a training on all of them.

    Each harm returns when the training is at work again, on as many workers as there are hosts.
    """

    def __init__(self, folder: Path, *, data: Path, cluster: LocalCluster, draw: random.Random, say: Say) -> None:
        self.folder = folder
        self.data = data
        self.cluster = cluster
        self.draw = draw
        self.say = say
        self.run_id = ""
        self._training: subprocess.Popen[bytes] | None = None
        self._tracker: subprocess.Popen[bytes] | None = None

    @property
    def tracking_uri(self) -> str:
        """The server's address, as every host reaches it."""
        return f"http://{self.cluster.host(HEAD).ip}:{TRACKER_PORT}"

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts that train."""
        return [host.name for host in self.cluster.hosts if host.name != HEAD]

    def worker(self) -> Harm:
        """SIGKILL for one training process."""
        host = self.draw.choice([host for host in self.hosts if self._workers(host)])
        return self._harm("worker", f"of {host}", lambda: self._workers(host)[0].kill())

    def node(self) -> Harm:
        """SIGKILL for all processes of one host, which is started again a little later."""
        host = self.draw.choice(self.hosts)

        def strike() -> None:
            self.cluster.kill_node(host)
            time.sleep(AWAY_S)
            self.cluster.start_node(host)

        return self._harm("node", host, strike)

    def link(self) -> Harm:
        """One host's cable is pulled until the cluster has given it up; then it is plugged in and started again."""
        host = self.draw.choice(self.hosts)

        def strike() -> None:
            self.cluster.cut(host)
            self._wait(lambda: not self._alive(host), f"the cluster to give {host} up")
            self.cluster.mend(host)
            self.cluster.start_node(host)

        return self._harm("link", host, strike)

    def sigterm(self) -> Harm:
        """SIGTERM for one training process, as to a pod that is ended with a grace period."""
        host = self.draw.choice([host for host in self.hosts if self._workers(host)])
        return self._harm("sigterm", f"to a worker of {host}", lambda: self._workers(host)[0].terminate())

    def drain(self) -> Harm:
        """A node is drained, as before a preemption; Ray ends it once nothing runs there, and it comes back later."""
        host = self.draw.choice(self.hosts)

        def strike() -> None:
            before = len(self.events())
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
            command += ["--address", self.cluster.address, "--node-id", str(self.cluster.node_id(host))]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted back"]
            command += ["--deadline-remaining-seconds", str(DRAINED_IN_S)]
            subprocess.run(
                self.cluster.command(HEAD, command),
                env=os.environ | self.cluster.environment,
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=WAIT_S,
            )
            self._wait(lambda: not self._alive(host), f"Ray to end the drained {host}")
            self._wait(lambda: any(one["event"] == "resumed" for one in self.events()[before:]), "the others to go on")
            self.cluster.start_node(host)

        return self._harm("drain", host, strike)

    def driver(self) -> Harm:
        """SIGKILL for the command that the user started, who then resumes the run."""

        def strike() -> None:
            training = self._running()
            training.kill()
            training.wait()
            self.train(f"resume={self.run_id}")

        return self._harm("driver", "and resumed", strike)

    def tracker(self) -> Harm:
        """The tracking server is gone for a minute, while the training goes on."""
        before = self.step()
        self._end_tracker()
        time.sleep(TRACKER_AWAY_S)
        reached = self.step()
        if reached <= before:
            raise RuntimeError(f"without its tracking server the training stood at step {before}")
        self.start_tracker()
        return Harm("tracker", f"away {TRACKER_AWAY_S:g} s, {reached - before} steps meanwhile", 0, 0.0)

    def join(self) -> Harm:
        """One more host joins."""

        def strike() -> None:
            self.cluster.add_node()

        return self._harm("join", f"host {len(self.hosts) + 1}", strike)

    def train(self, *overrides: str) -> None:
        """Starts the training, or goes on with it, and returns when all workers have done a step."""
        log = self.folder / "train.log"
        before = len(self.events())
        command = [sys.executable, "-m", "onestage.cli", "train", f"data.root={self.data}", *TRAINING]
        command += [
            f"cluster.num_workers={len(self.hosts) + 2}",
            "cluster.min_workers=1",
            f"cluster.global_batch={GLOBAL_BATCH}",
            f"tracking.uri={self.tracking_uri}",
            "tracking.every_seconds=0",  # to see each step once
            f"storage={self.folder / 'runs'}",
        ]
        with log.open("ab") as file:
            start = file.tell()
            self._training = subprocess.Popen(
                self.cluster.command(HEAD, [*command, *overrides]),
                env=os.environ | self.cluster.environment | {"OMP_NUM_THREADS": "1"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

        def named() -> bool:
            words = log.read_bytes()[start:].decode(errors="replace").split()
            if "run" in words[:-1]:
                self.run_id = words[words.index("run") + 1]
            return bool(self.run_id)

        self._wait(named, "the run's id")
        self._wait(lambda: self._whole(before), f"{len(self.hosts)} workers to train")

    def finish(self) -> int:
        """Preempts the training, resumes it for some last steps, and returns how many steps it has done by then."""
        training = self._running()
        training.send_signal(signal.SIGTERM)
        if (code := training.wait(WAIT_S)) != PREEMPTED:
            raise RuntimeError(f"a preempted training ended with exit code {code}: {self._last_words()}")
        steps = self.step() + LAST_STEPS
        self.train(f"resume={self.run_id}", f"trainer.max_steps={steps}")
        if (code := self._running().wait(WAIT_S)) != 0:
            raise RuntimeError(f"the training ended with exit code {code}: {self._last_words()}")
        return steps

    def start_tracker(self) -> None:
        """Starts the tracking server, and returns when it answers."""
        ip = self.cluster.host(HEAD).ip
        server = [sys.executable, "-m", "mlflow", "server", "--host", ip, "--port", str(TRACKER_PORT), "--workers", "1"]
        server += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--allowed-hosts", "*"]
        server += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "tracker.log").open("ab") as log:
            self._tracker = subprocess.Popen(
                self.cluster.command(HEAD, server),
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ask = f"import urllib.request as r; r.urlopen('{self.tracking_uri}/health', timeout=3)"
        answers = self.cluster.command(HEAD, [sys.executable, "-c", ask])
        self._wait(lambda: subprocess.run(answers, capture_output=True).returncode == 0, "the tracking server")

    def end(self) -> None:
        """Ends the training and the server; the cluster is its owner's."""
        if self._training is not None and self._training.poll() is None:
            self._training.kill()
            self._training.wait()
        self._end_tracker()

    def events(self) -> list[dict[str, Any]]:
        """The run's history so far."""
        try:
            lines = (self.folder / "runs" / self.run_id / "history.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines]

    def step(self) -> int:
        """The last step that the run's driver heard of."""
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((self.folder / "runs" / self.run_id / "reached.json").read_text())["step"])
        return 0

    def _harm(self, kind: str, what: str, strike: Callable[[], None]) -> Harm:
        """Strikes, and waits until the training is whole again; what it cost is in the run's history."""
        self.say(f"{kind} {what}")
        before = len(self.events())
        strike()
        self._wait(lambda: self._whole(before), f"the training to go on after {kind} {what}")
        cost = [event for event in self.events()[before:] if event["event"] == "resumed"]
        return Harm(kind, what, sum(one["lost_steps"] for one in cost), max(one["recovery_s"] for one in cost))

    def _whole(self, before: int) -> bool:
        """Whether since event ``before`` a group as large as the cluster has started and done a step."""
        training = self._running()
        if training.poll() not in (None, 0):
            raise RuntimeError(f"the training ended with exit code {training.returncode}: {self._last_words()}")
        earlier, events = self.events()[:before], self.events()[before:]
        started = [place for place, event in enumerate(events) if event["event"] == "started"]
        if not started or events[started[-1]]["workers"] != len(self.hosts):
            return False
        if not earlier:
            return self.step() > 0
        return any(event["event"] == "resumed" for event in events[started[-1] :])

    def _workers(self, host: str) -> list[psutil.Process]:
        """The host's training processes."""
        return [one for one in self.cluster.processes(host) if "RayTrainWorker" in " ".join(_command(one))]

    def _alive(self, host: str) -> bool:
        return any(node.alive for node in self.cluster.nodes if node.name == host)

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._training is not None
        return self._training

    def _end_tracker(self) -> None:
        if self._tracker is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._tracker.pid, signal.SIGKILL)
            self._tracker.wait()

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"waited {WAIT_S:g} s for {what}: {self._last_words()}")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        """The end of the training's log."""
        with suppress(OSError):
            return "\n".join((self.folder / "train.log").read_text(errors="replace").splitlines()[-12:])
        return "nothing was said"


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


KINDS: Final[dict[str, Callable[[Rig], Harm]]] = {
    "worker": Rig.worker,
    "node": Rig.node,
    "link": Rig.link,
    "sigterm": Rig.sigterm,
    "drain": Rig.drain,
    "driver": Rig.driver,
    "tracker": Rig.tracker,
    "join": Rig.join,
}


@contextmanager
def rigged(folder: Path, *, data: Path, seed: int, name: str, say: Say) -> Iterator[Rig]:
    """Three hosts, one of them the head's, with a training on the other two; all of it is ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = local_cluster.up(name, workers=2, namespaces=True, say=say)
    try:
        rig = Rig(folder.resolve(), data=data.resolve(), cluster=cluster, draw=random.Random(seed), say=say)
        try:
            rig.start_tracker()
            rig.train()
            yield rig
        finally:
            rig.end()
    finally:
        cluster.down()


def bench(*, kills: int, seed: int, data: Path | None, storage: Path, say: Say) -> dict[str, Any]:
    """``kills`` harms of kinds and at times drawn from ``seed``; at most one host joins.

    Returns the report: a row a harm, and what the run looks like at its end.
    """
    if kills < 1:
        raise InputError(f"need --kills >= 1, got {kills}")
    if data is None:
        data = storage / "scenes"
        if not (data / "dataset.json").is_file():
            draw(data, seed=1, num_train=200, num_val=16, num_test=4, size=96)
    with rigged(storage, data=data, seed=seed, name="chaos", say=say) as rig:
        harms: list[Harm] = []
        kinds = list(KINDS)
        while len(harms) < kills:
            kind = rig.draw.choice(kinds)
            if kind == "join":
                kinds.remove(kind)
            time.sleep(rig.draw.uniform(0.0, 10.0))
            harms.append(KINDS[kind](rig))
        steps = rig.finish()
        return report(rig, harms, steps=steps)


def report(rig: Rig, harms: Sequence[Harm], *, steps: int) -> dict[str, Any]:
    """What the harms cost; ``passed`` where nothing was lost for good: FINISHED, with each step's loss logged once."""
    import torch

    checkpoint = rig.folder / "runs" / rig.run_id / "checkpoints" / "last.ckpt"
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    logged, status, reached = _logged_steps(rig), _status(rig), loaded["global_step"]
    twice = sorted(step for step, times in logged.items() if times > 1)
    missing = sorted(set(range(steps)) - set(logged))  # Lightning counts from 0
    return {
        "harms": [vars(harm) for harm in harms],
        "steps": steps,
        "status": status,
        "global_step": reached,
        "images_seen": loaded["onestage"]["images_seen"],
        "logged_twice": twice,
        "not_logged": missing,
        "passed": status == "FINISHED" and reached == steps and not twice and not missing,
    }


def _logged_steps(rig: Rig) -> Counter[int]:
    """How often the loss of each step is in the store."""
    import sqlite3

    with sqlite3.connect(rig.folder / "mlflow.db") as store:
        rows = store.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/loss'", (rig.run_id,))
        return Counter(step for (step,) in rows)


def _status(rig: Rig) -> str:
    import sqlite3

    with sqlite3.connect(rig.folder / "mlflow.db") as store:
        (status,) = store.execute("SELECT status FROM runs WHERE run_uuid = ?", (rig.run_id,)).fetchone()
        return str(status)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        f"| {number} | {one['kind']} | {one['what']} | {one['lost_steps']} | {one['recovery_s']:.1f} |"
        for number, one in enumerate(report["harms"], start=1)
    ]
    return "\n".join(
        [
            "| | harm | | steps lost | seconds to the next step |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{report['status']} after {report['global_step']} steps, {report['images_seen']} images; "
            + (
                "every step was logged once"
                if not report["logged_twice"] and not report["not_logged"]
                else f"steps missing: {report['not_logged'][:10]}, twice: {report['logged_twice'][:10]}"
            ),
        ]
    )
