"""Who is dead and who is not: processes of this host, hosts that fall silent, wrong clocks, and those that return."""

import os
import subprocess
import sys
import time

import pytest

from onestage.tracking import heartbeat, leaderboard, runs
from onestage.tracking.client import client
from onestage.tracking.heartbeat import beating, dead_because, store_time
from onestage.tracking.job_links import runs_of_jobs


@pytest.fixture
def experiment(request):
    return request.node.name


@pytest.fixture
def far(store, experiment):
    """Opens a run whose driver is on another host, and showed life so many seconds ago."""

    def open_run(silent_s):
        run_id = runs.open_run(store, experiment, tags={})
        client(store).set_tag(run_id, "onestage.host", "far")
        client(store).set_tag(run_id, "onestage.heartbeat", f"{time.time() - silent_s:.0f}")
        return run_id

    return open_run


def status(store, run_id):
    run = client(store).get_run(run_id)
    return run.info.status, run.data.tags.get("onestage.reason")


def until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestWhoIsDead:
    def test_a_host_that_is_silent_for_more_than_ten_minutes(self, store, experiment, far):
        alive, dead, unknown = far(540), far(660), far(0)
        client(store).delete_tag(unknown, "onestage.heartbeat")  # as an older version leaves it
        assert runs.mark_dead(store, experiment) == [dead]
        assert status(store, dead) == ("KILLED", "no sign of life from its driver on far for 11 minutes")
        assert status(store, alive) == status(store, unknown) == ("RUNNING", None)

    def test_it_ended_when_it_was_last_heard_of(self, store, experiment, far):
        dead = far(3600)
        client(store).set_tag(dead, "onestage.heartbeat", f"{time.time() + 7 - 3600:.0f}")
        runs.mark_dead(store, experiment)
        info = client(store).get_run(dead).info
        assert info.end_time == info.start_time  # not before it began

    def test_a_beat_from_the_future_is_a_wrong_clock_and_no_death(self, store, experiment, far):
        far(-7200)
        assert runs.mark_dead(store, experiment) == []

    def test_a_container_with_the_hosts_name_is_another_host(self, store, experiment):
        """Its processes are not seen from here; that they are gone can't be said by their number."""
        run_id = runs.open_run(store, experiment, tags={})
        client(store).set_tag(run_id, "onestage.pids", "pid:[1]")
        client(store).set_tag(run_id, "onestage.pid", "999999")
        assert runs.mark_dead(store, experiment) == []

    def test_a_store_that_is_away_marks_none_and_hinders_none(self):
        assert runs.mark_dead("http://127.0.0.1:9", "any") == []


class TestWhoSeesThem:
    def test_a_look_at_the_run(self, store, far):
        assert runs.find_run(store, far(660)).status == "KILLED"

    def test_a_leaderboard(self, store, experiment, far):
        far(660)
        [entry] = leaderboard.entries(store, experiment)
        assert (entry.status, entry.reason) == ("KILLED", "no sign of life from its driver on far for 11 minutes")

    def test_a_list_of_jobs(self, store, far):
        run_id = far(660)
        client(store).set_tag(run_id, runs.JOB_TAG, "train-1")
        assert runs_of_jobs({store: ["train-1"]}) == {"train-1": run_id}
        assert status(store, run_id)[0] == "KILLED"

    def test_whoever_goes_on_with_another_run(self, store, experiment, far):
        dead, mine = far(660), runs.open_run(store, experiment, tags={})
        runs.reopen_run(store, mine)
        assert [status(store, one)[0] for one in (dead, mine)] == ["KILLED", "RUNNING"]

    def test_the_last_unfinished_run_is_not_one_that_trains_elsewhere(self, store, experiment, far):
        first, second = far(60), far(60)
        assert runs.last_unfinished(store, experiment) is None
        client(store).set_tag(first, "onestage.heartbeat", "1")
        assert runs.last_unfinished(store, experiment) == first
        client(store).delete_tag(second, "onestage.heartbeat")  # nothing is known of it
        assert runs.last_unfinished(store, experiment) == second


class TestClock:
    def test_is_the_servers(self, server, experiment, monkeypatch):
        """A host whose clock is an hour ahead neither kills those that live nor looks alive when it is dead."""
        run_id = runs.open_run(server.uri, experiment, tags={})
        client(server.uri).set_tag(run_id, "onestage.host", "far")
        right = time.time
        monkeypatch.setattr(heartbeat.time, "time", lambda: right() + 3600)
        assert store_time(server.uri) == pytest.approx(right(), abs=2)
        assert runs.mark_dead(server.uri, experiment) == []
        theirs = runs.open_run(server.uri, experiment, tags={})
        beat = float(runs.find_run(server.uri, theirs).tags["onestage.heartbeat"])
        assert beat == pytest.approx(right(), abs=2)

    def test_is_known_from_before_when_the_server_is_silent(self, monkeypatch):
        monkeypatch.setitem(heartbeat._ahead_s, "http://127.0.0.1:9", -100.0)
        assert store_time("http://127.0.0.1:9") == pytest.approx(time.time() - 100, abs=2)

    def test_of_a_server_that_lets_us_not_in_tells_the_time(self, proxy, monkeypatch):
        proxy.failing = True  # with a Date, as every answer
        assert store_time(proxy.uri) == pytest.approx(time.time(), abs=2)
        assert proxy.uri in heartbeat._ahead_s


class TestBeating:
    @pytest.fixture(autouse=True)
    def _fast(self, monkeypatch):
        monkeypatch.setattr(heartbeat, "EVERY_S", 0.1)

    def test_a_run_that_was_given_up_runs_again_and_ends_properly(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        # As another host sees it after twelve minutes without the network.
        runs.end_run(store, run_id, "KILLED", "no sign of life from its driver on far for 12 minutes")
        with beating(store, run_id):
            until(lambda: status(store, run_id) == ("RUNNING", None))
        assert runs.end_run(store, run_id, "FINISHED")
        assert status(store, run_id) == ("FINISHED", None)

    def test_one_that_is_given_up_at_the_last_moment_ends_without_that_reason(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        runs.end_run(store, run_id, "KILLED", "its process ended without a word")
        assert runs.end_run(store, run_id, "FINISHED")
        assert status(store, run_id) == ("FINISHED", None)

    def test_an_end_that_somebody_gave_it_stays(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        with beating(store, run_id):
            before = runs.find_run(store, run_id).tags["onestage.heartbeat"]
            until(lambda: runs.find_run(store, run_id).tags["onestage.heartbeat"] > before)
            runs.end_run(store, run_id, "KILLED", "stopped by asha")
            time.sleep(0.4)
        assert status(store, run_id) == ("KILLED", "stopped by asha")

    def test_who_lost_the_run_to_another_driver_leaves_it_to_that_one(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        with beating(store, run_id):
            before = runs.find_run(store, run_id).tags["onestage.heartbeat"]
            until(lambda: runs.find_run(store, run_id).tags["onestage.heartbeat"] > before)
            client(store).set_tag(run_id, "onestage.host", "far")
            client(store).set_tag(run_id, "onestage.heartbeat", "17")
            time.sleep(0.4)
        assert runs.find_run(store, run_id).tags["onestage.host"] == "far"
        assert client(store).get_run(run_id).data.tags["onestage.heartbeat"] == "17"

    def test_what_a_resume_could_not_tell_is_told_later(self, store, experiment):
        """The store was away when a killed run was opened again: it has its former driver, and is KILLED."""
        run_id = runs.open_run(store, experiment, tags={})
        client(store).set_tag(run_id, "onestage.pid", "1")
        runs.end_run(store, run_id, "KILLED", "interrupted from the keyboard")
        with beating(store, run_id):
            until(lambda: status(store, run_id) == ("RUNNING", None))
        assert runs.find_run(store, run_id).tags["onestage.pid"] == str(os.getpid())

    def test_a_store_that_is_away_is_no_matter(self, caplog):
        began = time.monotonic()
        with beating("http://127.0.0.1:9", "0" * 32):
            time.sleep(0.2)
        assert time.monotonic() - began < 2.5
        assert [record for record in caplog.records if record.name.startswith("onestage")] == []

    def test_without_a_store_nothing_beats(self):
        with beating(None, None):
            pass


@pytest.mark.slow
def test_a_driver_that_is_killed_is_found_dead_and_one_that_stands_still_is_not(store, experiment):
    """By the process on this host, also where its beats are old."""
    script = (
        "import sys, time\nfrom onestage.tracking import heartbeat, runs\n"
        f"run_id = runs.open_run({store!r}, {experiment!r}, tags={{}})\n"
        f"with heartbeat.beating({store!r}, run_id):\n    print(run_id, flush=True)\n    time.sleep(120)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    client(store).set_tag(run_id, "onestage.heartbeat", "1000")
    assert runs.mark_dead(store, experiment) == []
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    assert runs.mark_dead(store, experiment) == [run_id]
    assert status(store, run_id) == ("KILLED", "its process ended without a word")


def test_tags_without_a_process_say_nothing():
    assert dead_because({}, time.time) is None
