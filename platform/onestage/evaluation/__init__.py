"""A trained detector on a split of a dataset, and on pictures."""

from onestage.evaluation.prediction import predict, read_image
from onestage.evaluation.runs import evaluate, shown

__all__ = ["evaluate", "predict", "read_image", "shown"]
