"""Lightning's loggers write to one store each; ours hands the numbers to whoever keeps them."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class SinkLogger(Logger):
    """Gives every logged dict of numbers, with its step, to ``sink`` on rank 0."""

    def __init__(self, sink: Callable[[dict[str, float], int], None]) -> None:
        super().__init__()
        self.sink = sink

    @property
    def name(self) -> str:
        return "onestage"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.sink({name: float(value) for name, value in metrics.items()}, step or 0)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The driver logs the config once."""
