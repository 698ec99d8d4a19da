"""How a training ends other than by itself or by a fault."""


class Stopped(Exception):
    """All ranks stopped behind the same step, with a checkpoint saved, because they were asked to."""


class Diverged(RuntimeError):
    """One line: the step, the parts of the loss, the images, and where they are saved."""
