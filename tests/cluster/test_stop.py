"""A wish to stop: passed on between steps where somebody looks, an exception where nobody does."""

import os
import signal
import threading
import time

import pytest

from onestage.cluster.stop import Preempted, Stop


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # handlers run between two instructions


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_nobody_looks(number: int, error: type[BaseException]) -> None:
    with pytest.raises(error), Stop().signals():
        send(number)


@pytest.mark.parametrize(("number", "why"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_somebody_looks(number: int, why: str) -> None:
    stop = Stop()
    with stop.signals(), stop.listened():
        assert stop.asked is None
        send(number)
        assert stop.asked == why


def test_asked_twice_it_ends_where_it_stands() -> None:
    stop = Stop()
    with stop.signals(), stop.listened():
        send(signal.SIGTERM)
        with pytest.raises(Preempted):
            send(signal.SIGINT)


def test_the_handlers_from_before_are_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop().signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_in_a_thread_that_cannot_handle_signals_it_does_without() -> None:
    done = []

    def enter() -> None:
        with Stop().signals():
            done.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert done == [True]
