"""What goes wrong with stored data while it is read."""

from onestage.errors import InputError


class Unreadable(InputError):
    """A sample, or the shard that holds it, can't be had: its batch goes on without it, and it is counted."""
