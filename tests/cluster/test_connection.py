"""The way to Ray: what is no head, or lets nobody in, is said in one line; a SIGTERM during Ray's start is ours."""

import signal
import socket
import sys

import pytest

from onestage.cluster import connection
from onestage.cluster.stop import Preempted, Stop
from onestage.errors import InputError

TOKEN = "a" * 64


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def attach(address: str) -> None:
    cluster = {"address": address, "env": [], "ship": False}
    with connection.attached(cluster, wait_s=0, say=lambda text: None):
        raise AssertionError("there is nothing to attach to")


@pytest.mark.usefixtures("token")
def test_no_head_is_said_at_once() -> None:
    address = free_address()
    with pytest.raises(InputError, match=f"no Ray head at {address}"):
        attach(address)


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("port", ["66000", "gcs"])
def test_what_is_no_port_is_not_waited_for(port: str) -> None:
    with pytest.raises(InputError, match=f"no Ray head at localhost:{port}"):
        attach(f"localhost:{port}")


@pytest.mark.usefixtures("token")
def test_what_is_no_head_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(InputError, match=f"{address} does not answer as a Ray head"):
            connection.check_head(address, limit_s=3.0)


def test_a_head_that_is_away_may_come_yet() -> None:
    connection.check_head(free_address())  # whoever attaches waits for it


def test_a_sigterm_while_ray_starts_is_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own start registers a handler that exits, which code in between may swallow."""
    import ray

    def init(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(1))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    stop = Stop()
    with stop.signals(), pytest.raises(Preempted), connection.local(cores=1, gpus=0):
        raise AssertionError("not reached")
    assert stop.asked == "preempted"
    assert ray._private.utils.set_sigterm_handler.__module__ == "ray._private.utils"
