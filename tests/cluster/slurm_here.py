"""A Slurm of two nodes on this machine, of Debian's own daemons: slurmctld, two slurmd, munged."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from onestage.cluster.slurm_node import ports

DAEMONS: Final = ("slurmctld", "slurmd", "munged", "sbatch")
START_S: Final = 30.0
SETTINGS: Final = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,requeue_delay=1
MpiDefault=none
KillWait=60
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Runs within; the variables that Slurm's commands need. Skips where Debian's packages are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin"  # where slurmd is, off a plain user's PATH
    missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    names = {"folder": folder, "host": socket.gethostname().split(".")[0], "user": Path.home().owner()}
    (folder / "slurm.conf").write_text(SETTINGS.format(ports=ports(3), **names))
    files = {"key": "munge.key", "pid": "munged.pid", "seed": "seed", "log": "munged.log"}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/{file}" for name, file in files.items()]
    daemons = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    running = []
    try:
        for argv in daemons:
            with open(folder / "daemons.log", "ab") as log:
                running.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True))
            if argv is munge:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _idle(environment) == 2, folder)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(30)


def _idle(environment: dict[str, str]) -> int:
    asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split().count("idle")


def _wait(ready, folder: Path) -> None:
    end = time.monotonic() + START_S
    while not ready():
        assert time.monotonic() < end, (folder / "daemons.log").read_text()[-3000:]
        time.sleep(0.2)
