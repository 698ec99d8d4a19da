"""Whether a sweep's winner is better than the model that is in use, both on the same held-out images."""

from dataclasses import dataclass
from typing import Any

from onestage.config import quoted
from onestage.promotion import METRIC, measure, promote


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``version`` is the champion now; ``score`` the winner's and ``former`` the present champion's on ``split``."""

    name: str
    version: str
    run_id: str
    split: str
    score: float
    former: float | None
    crowned: bool

    def __str__(self) -> str:
        measured = f"{self.split}/{METRIC} {self.score:.4f}"
        if self.former is None:
            return f"champion: models:/{self.name}@champion is now version {self.version}, {measured}"
        if self.crowned:
            return f"champion: version {self.version} of {self.name}, {measured}, beats {self.former:.4f}"
        return (
            f"champion: version {self.version} of {self.name} stays with {self.former:.4f}; the winner has {measured}"
        )


def judge(run_id: str, *, uri: str, name: str, config: dict[str, Any]) -> Verdict:
    """Evaluates the winner on the test images (the validation's where there are none) and compares.

    What the champion scored on the same data is read off its version; measured on other data it is evaluated again.
    """
    settings = {"data.root": config["data"]["root"], "storage": config["storage"], "tracking.uri": uri}
    overrides = [f"{key}={quoted(value)}" for key, value in settings.items()]
    made = promote(run_id, uri=uri, name=name, overrides=overrides, again=True, must_beat=True)
    score = made.score or measure(run_id, None, overrides)  # a champion by hand has none
    assert made.version is not None
    return Verdict(
        name=name,
        version=made.version,
        run_id=run_id,
        split=score.split,
        score=score.value,
        former=None if made.former_score is None else made.former_score.value,
        crowned=made.moved,
    )
