"""A trained detector on a split of a dataset, and on pictures."""

from onestage.evaluation.comparison import compare
from onestage.evaluation.prediction import predict, read_image
from onestage.evaluation.runs import evaluate, shown

__all__ = ["compare", "evaluate", "predict", "read_image", "shown"]
