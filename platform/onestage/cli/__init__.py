"""The command line. Everything heavy is imported by the verb that needs it."""

from onestage.cli.app import main

__all__ = ["main"]
