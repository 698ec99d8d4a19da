"""What `onestage doctor` promises: every finding has its figure and its remedy, and whoever is silent is named."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onestage.cluster import doctor_hosts, doctor_node, doctor_verdicts
from onestage.cluster.doctor import CHECKS, Check, Report, examine, planned
from onestage.cluster.doctor_hosts import Hosts, pairs
from onestage.cluster.doctor_node import Facts, Plan, attempt
from onestage.cluster.doctor_verdicts import Row, capacity, dashboard
from onestage.cluster.local_cluster import LocalCluster
from onestage.cluster.resources import Node
from onestage.errors import InputError

from .hosts import hosts  # noqa: F401

GIB = 2**30


def levels(rows: list[Row]) -> dict[str, str]:
    return {row.where: row.level for row in rows}


def plan(tmp_path: Path, **changes: Any) -> Plan:
    settings = {"cache": None, "cache_gib": 50.0, "timeout_s": 5.0, "retries": 0}
    fields = {"root": None, "settings": settings, "storage": str(tmp_path / "runs"), "tracking_uri": None, "mark": "m"}
    return Plan(**{**fields, **changes})


# Verdicts, on facts made by hand.

INSTALLED = {
    "python": "3.11.7",
    "onestage": "0.1.0",
    "source": "aaaa",
    "torch": "2.15.0+cu132",
    "cuda": "13.2",
    "ray": "2.60.0",
    "pytorch-lightning": "2.6.6",
    "torchvision": "0.29.0",
    "mlflow": "3.17.0",
    "platform": "Linux x86_64",
}


@pytest.mark.parametrize(
    ("package", "version", "level"),
    [
        ("ray", "2.59.0", "problem"),
        ("torch", "2.14.0+cu132", "problem"),
        ("source", "bbbb", "problem"),
        ("pytorch-lightning", None, "problem"),
        ("python", "3.12.1", "problem"),
        ("python", "3.11.9", "ok"),
        ("mlflow", "3.16.0", "warning"),
        ("platform", "Linux aarch64", "warning"),
    ],
)
def test_the_node_that_has_another_version_is_named(package: str, version: str | None, level: str) -> None:
    facts = {name: dict(INSTALLED) for name in ("driver", "a", "b", "c")}
    facts["b"][package] = version
    rows = doctor_verdicts.judge_versions("versions", facts)
    assert levels(rows) == {"driver": "ok", "a": "ok", "b": level, "c": "ok"}
    if level != "ok":
        (found,) = (row for row in rows if row.where == "b")
        assert package in found.figure and found.remedy


def test_a_driver_without_cuda_suits_nodes_with_it() -> None:
    facts = {"driver": {**INSTALLED, "cuda": None}, "a": dict(INSTALLED), "b": dict(INSTALLED)}
    assert set(levels(doctor_verdicts.judge_versions("versions", facts)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("offset_s", "within_s", "level"),
    [
        (0.4, 0.001, "ok"),
        (-3.0, 0.01, "warning"),
        (90.0, 0.01, "problem"),
        (1.2, 0.5, "ok"),  # it may be 0.7 s only
    ],
)
def test_a_clock_is_blamed_for_what_it_is_off_in_any_case(offset_s: float, within_s: float, level: str) -> None:
    rows = doctor_verdicts.judge_clock("clock", {"a": {"offset_s": offset_s, "within_s": within_s}})
    assert levels(rows) == {"a": level}


def test_a_small_shared_memory_is_found() -> None:
    facts = {
        "container": {"size": 64 * 2**20, "free": 64 * 2**20},  # Docker's own default
        "full": {"size": 16 * GIB, "free": GIB},
        "fine": {"size": 16 * GIB, "free": 15 * GIB},
    }
    rows = doctor_verdicts.judge_memory("/dev/shm", facts)
    assert levels(rows) == {"container": "problem", "full": "warning", "fine": "ok"}
    assert "--shm-size" in rows[0].remedy and "delete" in rows[1].remedy


def test_a_disk_on_which_ray_writes_no_more_is_found() -> None:
    disk = {"path": "/tmp/ray", "size": 1000 * GIB, "free": 40 * GIB}  # 96 % full
    rows = doctor_verdicts.judge_disks("disk", {"a": {doctor_node.RAYS_FOLDER: disk, "storage": disk}})
    assert [row.level for row in rows] == ["problem", "ok"]


def test_few_open_files_are_a_warning() -> None:
    rows = doctor_verdicts.judge_limits("open files", {"a": {"open_files": 1024}, "b": {"open_files": 65536}})
    assert levels(rows) == {"a": "warning", "b": "ok"}


def test_an_open_token_and_a_public_address_are_warnings() -> None:
    safe = {"token_file": "/t", "token_mode": 0o600, "asks_token": True, "public": []}
    facts = {
        "safe": safe,
        "readable": {**safe, "token_mode": 0o644},
        "free for all": {**safe, "asks_token": False},
        "public": {**safe, "public": ["8.8.8.8"]},
    }
    rows = doctor_verdicts.judge_exposure("access", facts)
    assert levels(rows) == {"safe": "ok", "readable": "warning", "free for all": "warning", "public": "warning"}
    assert rows[1].remedy == "chmod 600 /t"


@pytest.mark.parametrize(
    ("address", "asks_token", "level"),
    [
        ("127.0.0.1:8265", False, "ok"),
        ("10.0.0.7:8265", True, "ok"),
        ("10.0.0.7:8265", False, "warning"),
        ("8.8.8.8:8265", True, "warning"),
    ],
)
def test_a_dashboard_for_strangers_is_a_warning(address: str, asks_token: bool, level: str) -> None:
    assert [row.level for row in dashboard(address, asks_token=asks_token)] == [level]


def test_a_sqlite_file_is_for_one_machine() -> None:
    alone = doctor_verdicts.judge_tracking("MLflow", {"driver": {"seconds": 1.0, "elsewhere": 0}})
    several = doctor_verdicts.judge_tracking("MLflow", {"driver": {"seconds": 1.0, "elsewhere": 2}})
    assert [alone[0].level, several[0].level] == ["ok", "warning"]
    assert "onestage server" in several[0].remedy


def test_gpus_that_torch_cannot_use_are_a_problem() -> None:
    listing = "NVIDIA H100, 550.54.15, 81559, 4, 0\nNVIDIA H100, 550.54.15, 81559, 4, 0\n"
    one = {"gpus": doctor_node.parse_gpus(listing), "driver": "550.54.15", "torch": None, "unseen": False}
    ill = {**one, "gpus": doctor_node.parse_gpus(listing.replace(", 0\n", ", 3\n", 1))}
    facts = {
        "fine": one,
        "old driver": {**one, "torch": "the NVIDIA driver on your system is too old"},
        "ill": ill,
        "none": {"gpus": [], "driver": None, "torch": None, "unseen": False},
    }
    rows = doctor_verdicts.judge_gpus("GPUs", facts)
    assert levels(rows) == {"fine": "ok", "old driver": "problem", "ill": "problem", "none": "ok"}
    assert rows[0].figure == "2 x NVIDIA H100, driver 550.54.15"


def test_different_gpu_drivers_are_a_warning() -> None:
    one = {"gpus": doctor_node.parse_gpus("T4, 550, 1, 1, 0"), "driver": "550", "torch": None, "unseen": False}
    other = {**one, "driver": "535"}
    assert levels(doctor_verdicts.judge_gpus("GPUs", {"a": one, "b": other})) == {"a": "warning", "b": "warning"}


def speed(mb_per_s: float) -> Facts:
    return {"mb_per_s": mb_per_s, "bytes": 2**20, "seconds": 0.01, "backend": "gloo", "gpus_at_work": False}


def test_a_slow_link_is_found_alone_and_beside_faster_ones() -> None:
    facts = {"a - b": speed(1000), "b - c": speed(1100), "a - c": speed(150), "a - d": speed(20)}
    rows = doctor_verdicts.judge_pairs("all-reduce", facts)
    assert levels(rows) == {"a - b": "ok", "b - c": "ok", "a - c": "warning", "a - d": "warning"}  # the median is 575
    assert "575" in rows[2].figure


def test_pairs_that_were_not_measured_are_told() -> None:
    facts = {"a - b": speed(1000), "cluster": {"left_out": 9, "measured": 1}}
    (_, note) = doctor_verdicts.judge_pairs("all-reduce", facts)
    assert note.level == "skipped" and note.figure.startswith("1 of 10 pairs")


def test_of_many_pairs_some_are_drawn_and_no_node_is_forgotten() -> None:
    names = [f"n{number}" for number in range(20)]
    drawn = pairs(names, most=24)
    assert len(drawn) == len(set(map(frozenset, drawn))) == 24
    assert {name for pair in drawn for name in pair} == set(names)
    assert pairs(names, most=24) == drawn
    assert len(pairs(names, most=200)) == 190  # 20 * 19 / 2


def test_workers_that_never_fit_are_a_problem_and_those_that_do_not_yet_a_warning() -> None:
    asked = {"num_workers": 3, "min_workers": None, "cpus_per_worker": 2, "gpus_per_worker": None}
    empty = [Node("a", {"CPU": 4.0}, {"CPU": 4.0}), Node("b", {"CPU": 2.0}, {"CPU": 2.0})]
    busy = [Node("a", {"CPU": 4.0}, {"CPU": 1.0}), Node("b", {"CPU": 2.0}, {"CPU": 2.0})]
    assert [row.level for row in capacity(empty, dead=[], cluster=asked)] == ["ok"]
    assert [row.level for row in capacity(busy, dead=["c"], cluster=asked)] == ["warning", "warning"]
    assert [row.level for row in capacity(empty[:1], dead=[], cluster=asked)] == ["problem"]


def test_a_report_is_as_bad_as_its_worst_row() -> None:
    def report(*found: Any) -> Report:
        return Report([Row("a", "x", level, "") for level in found], 1.0)

    assert report("ok", "skipped").level == "ok"
    assert report("ok", "warning", "skipped").level == "warning"
    assert report("problem", "warning").level == "problem"


# Looks.


def test_who_does_not_answer_is_named_and_not_waited_for(tmp_path: Path) -> None:
    def hang(_: Plan) -> Facts:
        time.sleep(60)
        return {}

    start = time.monotonic()
    check = Check(
        "disk",
        lambda everyone, plan: everyone.everywhere(hang, plan, 0.2),
        doctor_verdicts.judge_disks,
        remedy="mend the mount",
    )
    assert examine(check, Hosts([]), plan(tmp_path)) == [
        Row("driver", "disk", "problem", "no answer in 0.2 s", "mend the mount")
    ]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_says_what_to_do(check: Check) -> None:
    assert check.remedy


def test_a_missing_shard_is_named(digits: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(digits, copied)
    assert attempt(doctor_node.shards, plan(tmp_path, root=str(copied)))["num_images"] == 33  # type: ignore[index]
    (copied / "val-000000.tar").unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards .* such as val-000000.tar: copy"):
        doctor_node.shards(plan(tmp_path, root=str(copied)))


def test_the_storage_is_left_as_it_was(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    measured = doctor_hosts.through_storage(Hosts([]), asked)
    assert list(measured) == ["driver"] and isinstance(measured["driver"], dict)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_a_problem() -> None:
    (row,) = examine(_check("storage"), Hosts([]), plan(Path("/proc/self")))
    assert row.level == "problem" and "/proc/self/runs can't be written" in row.figure and "mount" in row.remedy


def test_another_folder_of_the_same_name_is_not_the_drivers_storage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the driver's here: .*mount"):
        doctor_node.touch_storage(plan(tmp_path))


def test_a_new_sqlite_file_is_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (row,) = examine(_check("MLflow"), Hosts([]), plan(tmp_path, tracking_uri=uri))
    assert row.level == "ok" and list(tmp_path.iterdir()) == []


@pytest.fixture
def server() -> Iterator[Callable[[dict[str, tuple[int, str]]], str]]:
    """Starts a web server that gives these answers by path; its address."""
    started: list[http.server.ThreadingHTTPServer] = []

    def start(answers: dict[str, tuple[int, str]]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = answers.get(self.path, (404, ""))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None: ...

        started.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{started[-1].server_port}"

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def test_mlflow_is_asked_for_its_version(server: Callable[..., str], tmp_path: Path) -> None:
    from importlib.metadata import version

    mine = version("mlflow")
    for said, level in ((mine, "ok"), ("2.1.0", "warning")):
        uri = f"http://{server({'/version': (200, said)})}"
        (row,) = examine(_check("MLflow"), Hosts([]), plan(tmp_path, tracking_uri=uri))
        assert row.level == level and said in row.figure


def test_mlflow_that_refuses_the_hosts_name_is_a_problem(server: Callable[..., str], tmp_path: Path) -> None:
    answers = {"/version": (200, "3.17.0"), "/api/3.0/mlflow/server-info": (403, "Invalid Host header")}
    (row,) = examine(_check("MLflow"), Hosts([]), plan(tmp_path, tracking_uri=f"http://{server(answers)}"))
    assert row.level == "problem" and "--allowed-hosts" in row.remedy


def test_mlflow_that_is_away_is_a_problem_and_no_password_is_shown(tmp_path: Path) -> None:
    (row,) = examine(_check("MLflow"), Hosts([]), plan(tmp_path, tracking_uri="http://ann:pw@127.0.0.1:9"))
    assert row.level == "problem" and "onestage server" in row.remedy
    assert "pw" not in row.figure + row.remedy


def test_what_is_asked_is_the_trainings_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestage.config import compose

    monkeypatch.chdir(tmp_path)
    asked = planned(compose("train", ["data.root=shards", "storage=s3://bucket/runs", "tracking.uri=http://m:5000"]))
    assert (asked.root, asked.storage) == (str(tmp_path / "shards"), "s3://bucket/runs")
    assert asked.tracking_uri == "http://m:5000"
    with pytest.raises(InputError, match="timeout_s"):
        planned(compose("train", ["data.timeout_s=0"]))


def test_a_problem_ends_with_1_and_is_on_stdout_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*overrides: str) -> tuple[int, dict[str, Any]]:
        from argparse import ArgumentParser

        from onestage.cli import doctor

        parser = ArgumentParser()
        doctor.add(parser.add_subparsers())
        options = parser.parse_args(["doctor", "cluster=none", "tracking=none", *overrides, "--json"])
        return options.run(options), json.loads(capsys.readouterr().out.splitlines()[-1])

    code, report = run(f"storage={tmp_path}")
    assert (code, report["level"]) in ((0, "ok"), (0, "warning"))
    assert {row["check"] for row in report["rows"]} >= {"versions", "GPUs", "/dev/shm", "storage", "access"}
    code, report = run("storage=/proc/nowhere")
    assert (code, report["level"]) == (1, "problem")


def _check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


# On a cluster.


@pytest.mark.slow
def test_this_machine_is_examined_with_two_processes(
    onestage: Callable[..., subprocess.Popen[str]], digits: Path
) -> None:
    process = onestage("doctor", f"data.root={digits}", "tracking=none", "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    (link,) = (row for row in rows if row["check"] == "all-reduce")
    assert "two processes" in link["where"] and "MB/s with gloo" in link["figure"]
    places = {row["where"] for row in rows if row["check"] == "shards"}
    assert "driver" in places and len(places) == 2
    assert "looking at clock" in err


@pytest.mark.cluster
@pytest.mark.slow
def test_hosts_that_do_not_reach_each_other_are_named(
    hosts: LocalCluster,  # noqa: F811
    digits: Path,
    tmp_path: Path,
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}

    def on(node: str, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            hosts.command(node, command),
            env=environment | hosts.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def doctor(*overrides: str) -> tuple[int, list[dict[str, str]]]:
        asked = ["doctor", "cluster=ray", f"cluster.address={hosts.address}", f"data.root={digits}", *overrides]
        done = on("head", sys.executable, "-m", "onestage.cli", *asked, "--json")
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])["rows"]

    code, rows = doctor()
    assert code == 0, rows
    links = {row["where"] for row in rows if row["check"] == "all-reduce"}
    assert links == {"head - worker1", "head - worker2", "worker1 - worker2"}
    (store,) = (row for row in rows if row["check"] == "MLflow")  # the default, a SQLite file
    assert store["level"] == "warning" and "onestage server" in store["remedy"]

    # The two workers still reach the head, and it them.
    route = ("blackhole", f"{hosts.host('worker2').ip}/32")
    assert on("worker1", "ip", "route", "add", *route).returncode == 0
    try:
        code, rows = doctor("tracking=none")
    finally:
        on("worker1", "ip", "route", "del", *route)
    assert code == 1
    (broken,) = (row for row in rows if row["level"] == "problem")
    assert broken["where"] == "worker1 - worker2"
    assert hosts.host("worker1").ip in broken["figure"] and hosts.host("worker2").ip in broken["figure"]
    assert "GLOO_SOCKET_IFNAME=eth0" in broken["remedy"]
