"""A training that ended early because it was asked to."""


class Stopped(Exception):
    """All ranks stopped behind the same step, with a checkpoint saved."""
