"""Whether a sweep's winner is better than the model that is in use, both on the same held-out images."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from onestage.data.manifest import Manifest
from onestage.tracking import registry
from onestage.tracking.runs import SCORE_TAG

SCORE = "map"


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
        measured = f"{self.split}/{SCORE} {self.score:.4f}"
        if self.former is None:
            return f"champion: models:/{self.name}@champion is now version {self.version}, {measured}"
        if self.crowned:
            return f"champion: version {self.version} of {self.name}, {measured}, beats {self.former:.4f}"
        return (
            f"champion: version {self.version} of {self.name} stays with {self.former:.4f}; the winner has {measured}"
        )


def judge(run_id: str, *, uri: str, name: str, manifest: Manifest, config: dict[str, Any]) -> Verdict:
    """Evaluates the winner on the test images (the validation's where there are none) and compares.

    What the champion scored on the same data is read off its version; measured on other data it is evaluated again.
    """
    split = "test" if "test" in manifest.splits else "val"
    data = f"{manifest.content_hash}/{split}"
    present = registry.champion(uri, name)
    former: float | None = None
    if present is not None:
        known = present.tags.get(SCORE_TAG) if present.tags.get("onestage.data") == data else None
        former = float(known) if known is not None else _score(present.uri, split, config)
    its_own = present is not None and present.run_id == run_id
    score = former if its_own and former is not None else _score(run_id, split, config)
    if present is not None and former is not None and former >= score:
        return Verdict(
            name=name, version=present.version, run_id=run_id, split=split, score=score, former=former, crowned=False
        )
    tags = {"onestage.data": data, SCORE_TAG: repr(score), "onestage.split": split}
    version = registry.crown(uri, name, run_id, tags=tags).version
    return Verdict(name=name, version=version, run_id=run_id, split=split, score=score, former=former, crowned=True)


def _score(run: str, split: str, config: dict[str, Any]) -> float:
    from onestage.evaluation import evaluate

    overrides = [
        f"data.root={config['data']['root']}",
        f"storage={config['storage']}",
        f"tracking.uri={config['tracking']['uri']}",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluate(run, split=split, overrides=overrides, files=False)["metrics"]
    return float(metrics.get(f"{split}/{SCORE}", 0.0))
