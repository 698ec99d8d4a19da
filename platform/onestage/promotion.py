"""The gate before a model's alias: whether the candidate is as good as what is in use, on the same held-out images."""

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from onestage.errors import InputError
from onestage.tracking import registry
from onestage.tracking.registry import CHAMPION, Version
from onestage.tracking.runs import SCORE_TAG, find_run

METRIC: Final = "map"
DATA_TAG: Final = "onestage.data"
SPLIT_TAG: Final = "onestage.split"
DATASET_NAME_TAG: Final = "dataset.name"
SHORT: Final = 12
"""Letters of a content hash that tell datasets apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """COCO's mAP on a split of the dataset with that content hash."""

    value: float
    split: str
    dataset_hash: str

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> "Score | None":
        """What a version says of itself; None where it was registered without."""
        if not {SCORE_TAG, DATA_TAG} <= tags.keys():
            return None
        dataset_hash, _, split = tags[DATA_TAG].rpartition("/")
        return cls(value=float(tags[SCORE_TAG]), split=split, dataset_hash=dataset_hash)

    def tags(self) -> dict[str, str]:
        return {DATA_TAG: f"{self.dataset_hash}/{self.split}", SCORE_TAG: repr(self.value), SPLIT_TAG: self.split}

    def same_images(self, other: "Score") -> bool:
        return (self.split, self.dataset_hash) == (other.split, other.dataset_hash)

    def __str__(self) -> str:
        return f"{self.split}/{METRIC} {self.value:.4f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What came of it: ``version`` has the alias now (None: none has), ``former`` had it before.

    ``refused`` is why the alias stayed; None where the candidate has it now, or had it already.
    """

    name: str
    alias: str
    version: str | None
    former: str | None
    score: Score | None
    former_score: Score | None
    refused: str | None = None

    @property
    def moved(self) -> bool:
        return self.version != self.former


def promote(
    target: str,
    *,
    uri: str,
    name: str | None = None,
    alias: str = CHAMPION,
    split: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    again: bool = False,
    must_beat: bool = False,
) -> Promotion:
    """Gives the alias to a run's model, registered where it isn't yet, or to ``models:/NAME/VERSION``.

    A champion is refused where it scores lower than the present one (or no higher, where it ``must_beat`` it), or was
    measured on other images. What scores are not known are measured, on ``split`` (None: what was held out) of each
    one's own dataset or that of ``overrides``; with ``again`` so is that of a champion known on other images. Other
    aliases have no gate: a challenger is there to be tried. ``force`` asks for nothing.
    """
    candidate, name = _candidate(uri, target, name)
    present = registry.holder(uri, name, alias)
    held = None if present is None else present.version
    score = _known(candidate, split, overrides)
    former = None if present is None else Score.of_tags(present.tags)
    if candidate is not None and candidate.version == held:
        return Promotion(name=name, alias=alias, version=held, former=held, score=former, former_score=former)
    if score is None:
        score = _measured(target, split, overrides, needed=not force)
    if present is not None and alias == CHAMPION and not force:
        assert score is not None
        if former is None or (again and not score.same_images(former)):
            former = measure(present.uri, score.split, overrides)
        if refused := _refusal(score, former, must_beat=must_beat):
            return Promotion(
                name=name,
                alias=alias,
                version=held,
                former=held,
                score=score,
                former_score=former,
                refused=refused,
            )
    chosen = registry.register(uri, name, target) if candidate is None else candidate
    if score is not None:
        registry.tell(uri, chosen, score.tags())
    registry.give(uri, chosen, alias)
    return Promotion(name=name, alias=alias, version=chosen.version, former=held, score=score, former_score=former)


def measure(run: str, split: str | None, overrides: Sequence[str]) -> Score:
    """Evaluates RUN; the score is also logged into it, where it is one of MLflow's."""
    from onestage.evaluation import evaluate

    with contextlib.redirect_stdout(io.StringIO()):
        result = evaluate(run, split=split, overrides=overrides, files=False)
    split = str(result["split"])
    value = float(result["metrics"].get(f"{split}/{METRIC}", 0.0))
    return Score(value=value, split=split, dataset_hash=result["dataset_hash"])


def _candidate(uri: str, target: str, name: str | None) -> tuple[Version | None, str]:
    """The version that the target is already, if it is one, and the model's name: by default the dataset's."""
    if target.startswith("models:/"):
        found = registry.find(uri, target)
        if name not in (None, found.name):
            raise InputError(f"{target} is one of {found.name!r} already: to have it in {name!r} too, name its run")
        return found, found.name
    if name is None:
        name = find_run(uri, target).tags.get(DATASET_NAME_TAG)
    if name is None:
        raise InputError(f"run {target} does not say the name of its dataset: name the model with --name")
    return registry.of_run(uri, name, target), name


def _known(candidate: Version | None, split: str | None, overrides: Sequence[str]) -> Score | None:
    """What the candidate scored when it was promoted before, unless it is asked for on other images."""
    if candidate is None or any(one.startswith("data.") for one in overrides):
        return None
    known = Score.of_tags(candidate.tags)
    return known if known is not None and split in (None, known.split) else None


def _measured(target: str, split: str | None, overrides: Sequence[str], *, needed: bool) -> Score | None:
    try:
        return measure(target, split, overrides)
    except Exception as error:
        if needed:
            raise
        print(f"onestage: promoted without a score, since it could not be measured: {error}", file=sys.stderr)
        return None


def _refusal(score: Score, former: Score, *, must_beat: bool) -> str | None:
    """Why the candidate may not take the champion's place; None where it may."""
    if score.dataset_hash != former.dataset_hash:
        mine, its = score.dataset_hash[:SHORT], former.dataset_hash[:SHORT]
        return f"it was measured on dataset {mine}, the champion on {its}: their scores can't be compared"
    if score.split != former.split:
        return f"it was measured on {score}, the champion on {former}: their scores can't be compared"
    if score.value < former.value or (must_beat and score.value == former.value):
        return f"it has {score}, the champion {former}"
    return None
