"""What Slurm's own commands say: of jobs in its queue, and of those that it only has in its accounts."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from onestage.errors import InputError
from onestage.tracking.redaction import redact

CALL_S: Final = 60.0
NAME: Final = re.compile(r"(train|sweep|evaluate)-\d{4}-\d{6}-[0-9a-f]{4}")


def queued(numbers: Sequence[str] | None) -> dict[str, dict[str, str]]:
    """What Slurm's controller knows of these jobs, or of all with names such as ours, by number."""
    keys = {"number": "%i", "name": "%j", "state": "%T", "user": "%u", "reason": "%r", "submitted": "%V"}
    form = "|".join([*keys.values(), "%k"])
    which = [] if numbers is None else [f"--jobs={','.join(numbers)}"]
    said = call(["squeue", "--noheader", "--states=all", f"--format={form}", *which], unknown_is_none=True)
    rows = [line.strip().split("|", len(keys)) for line in said.splitlines()]
    found = [dict(zip([*keys, "comment"], row, strict=True)) for row in rows if len(row) == len(keys) + 1]
    return {one["number"]: one for one in found if NAME.fullmatch(one["name"])}


def past(numbers: Sequence[str]) -> dict[str, dict[str, str]]:
    """What Slurm's accounts say of jobs that its controller has forgotten; nothing where it keeps none."""
    if not numbers:
        return {}
    form = "--format=JobIDRaw,State"
    try:
        said = call(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(numbers)}", form])
    except InputError:
        return {}
    rows = [line.split("|") for line in said.splitlines()]
    return {row[0]: {"state": row[1], "reason": ""} for row in rows if len(row) == 2}


def call(argv: Sequence[str], environment: Mapping[str, str] = os.environ, *, unknown_is_none: bool = False) -> str:
    """What a command of Slurm's prints. Raises InputError for what it refuses."""
    try:
        done = subprocess.run(
            argv,
            env={**environment, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
    except FileNotFoundError:
        raise InputError(f"there is no {argv[0]} on PATH: send jobs from a machine with Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"Slurm's controller does not answer {argv[0]} within {CALL_S:g} s") from None
    if done.returncode and not (unknown_is_none and "Invalid job id" in done.stderr):
        raise InputError(f"Slurm refuses {argv[0]}: {redact(' '.join(done.stderr.split()))[:300]}")
    return done.stdout
