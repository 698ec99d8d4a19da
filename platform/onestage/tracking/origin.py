"""Where a run comes from: its host, process, user and code; and whether that process still is."""

import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Final, NamedTuple, Self

import psutil

HOST_TAG: Final = "onestage.host"
PID_TAG: Final = "onestage.pid"
STARTED_TAG: Final = "onestage.started"
GIT_S: Final = 5.0
CHANGES_LIMIT: Final = 500_000
COMMIT_TAG: Final = "mlflow.source.git.commit"
CODE_FOLDER: Final = "origin"
CHANGES: Final = f"{CODE_FOLDER}/changes.diff"
SHIPPED: Final = Path(__file__).parents[1] / CODE_FOLDER
"""In a package that was sent to a cluster, whose nodes have no checkout."""
NAMESPACE_TAG: Final = "onestage.pids"
"""Which processes the pid counts among: containers of one host may have its name and see others' processes not."""


def origin_tags() -> dict[str, str]:
    """What a new run says of itself; its process is this one."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.name": sys.argv[0] or sys.executable,
        "mlflow.source.type": "LOCAL",
        **code().tags(),
        **process_tags(),
    }


def process_tags() -> dict[str, str]:
    """This process, so that another can tell whether it is gone."""
    return {
        HOST_TAG: host(),
        PID_TAG: str(os.getpid()),
        STARTED_TAG: f"{psutil.Process().create_time():.2f}",
        NAMESPACE_TAG: _namespace(),
    }


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags is, or was, one that this process would see."""
    return tags.get(HOST_TAG) == host() and tags.get(NAMESPACE_TAG, _namespace()) == _namespace() and PID_TAG in tags


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags runs here; a reused pid shows by its start time."""
    if not is_here(tags):
        return False
    try:
        process = psutil.Process(int(tags[PID_TAG]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() - float(tags[STARTED_TAG])) < 1.0)
    except psutil.NoSuchProcess:
        return False


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user need not have a name.
        return str(os.getuid())


class Code(NamedTuple):
    """A checkout's commit, and what it has besides: the diff, and the names of files that git does not know.

    None where there is no checkout, or no change.
    """

    commit: str | None
    changes: str | None

    def tags(self) -> dict[str, str]:
        return {} if self.commit is None else {COMMIT_TAG: self.commit}

    def save(self, folder: Path) -> None:
        """Two files in ``folder``, for processes that are not where the checkout is."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._asdict().items():
            (folder / name).write_text(text or "", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(*((folder / name).read_text(encoding="utf-8") or None for name in cls._fields))


def code() -> Code:
    """Of the checkout that this process is in, or that this package was sent from."""
    if SHIPPED.is_dir():
        return Code.load(SHIPPED)
    commit = _git("rev-parse", "HEAD")
    return Code(commit and commit.strip(), _changes())


def _changes() -> str | None:
    """Cut at ``CHANGES_LIMIT`` characters."""
    # Neither of the programs that a repository may name for its files is run.
    diff = _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".")
    unknown = _git("ls-files", "--others", "--exclude-standard")
    if diff is None or unknown is None or not (diff or unknown):
        return None
    names = "".join(f"# not in git: {name}\n" for name in unknown.splitlines())
    text = names + diff
    return text if len(text) <= CHANGES_LIMIT else f"{text[:CHANGES_LIMIT]}\n# cut here, of {len(text):,} characters\n"


def packages() -> str:
    """Every package installed here with its version, as pip writes requirements."""
    found = {one.metadata["Name"]: one.version for one in distributions() if one.metadata["Name"]}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def _git(*arguments: str) -> str | None:
    try:
        asked = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace", timeout=GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout
