"""Hosts in network namespaces, for the tests that lose some of them: import ``hosts`` and mark the test ``cluster``."""

import os
import re
from collections.abc import Iterator

import psutil
import pytest

from onestage.cluster import local_cluster
from onestage.cluster.local_cluster import LocalCluster
from onestage.cluster.namespaces import Network, require
from onestage.errors import InputError


@pytest.fixture(scope="module")
def hosts() -> Iterator[LocalCluster]:
    """A head and two workers of one CPU, each on a host of its own; a test leaves all three alive."""
    skip_without_namespaces()
    end_orphans()
    cluster = local_cluster.up(f"t{os.getpid()}", workers=2, namespaces=True)
    try:
        yield cluster
    finally:
        cluster.down()


def skip_without_namespaces() -> None:
    """Skips the test, with the reason, where this machine or this user can't make hosts."""
    probe = Network(f"onestage-probe{os.getpid()}", 255)
    try:
        require()
        try:
            probe.create()
        finally:
            probe.remove()
    except InputError as error:
        pytest.skip(str(error))


def end_orphans() -> None:
    """Ends clusters of test processes that were killed before they could do so."""
    for name in local_cluster.names():
        owner = re.fullmatch(r"t(\d+)", name)
        if owner is not None and not psutil.pid_exists(int(owner[1])):
            local_cluster.down(name)
