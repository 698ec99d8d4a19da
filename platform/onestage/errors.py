"""Errors that a person can mend, and the exit codes that scripts can rely on."""

from typing import Final

DONE: Final = 0
FAILED: Final = 1
WRONG_INPUT: Final = 2
OUT_OF_BUDGET: Final = 3
PREEMPTED: Final = 75
INTERRUPTED: Final = 130


class InputError(ValueError):
    """Wrong usage or input: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2.
    """
