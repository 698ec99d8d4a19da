"""The gate before an alias, in a real store: the scores are tags of versions, as an earlier promotion leaves them."""

import pytest

from onestage import promotion
from onestage.errors import InputError
from onestage.promotion import Score, promote
from onestage.tracking import registry, runs
from onestage.tracking.client import client

OTHER = "b" * 64
SAME = "a" * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = runs.tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    runs.check(uri)
    return uri


def version(store: str, name: str, value: float | None, *, split: str = "test", dataset: str = SAME) -> str:
    """A new version with that score, as a reference."""
    run_id = runs.open_run(store, "gates", tags={"dataset.name": name})
    experiment = client(store).get_run(run_id).info.experiment_id
    model = client(store).create_logged_model(experiment, name="model", source_run_id=run_id)
    client(store).finalize_logged_model(model.model_id, "READY")
    made = registry.register(store, name, run_id)
    if value is not None:
        registry.tell(store, made, Score(value=value, split=split, dataset_hash=dataset).tags())
    return made.uri


def champion(store: str, name: str) -> str | None:
    held = registry.holder(store, name)
    return None if held is None else held.version


def test_the_first_one_needs_to_beat_nobody(store: str) -> None:
    made = promote(version(store, "first", 0.1), uri=store)
    assert (made.version, made.former, made.refused, made.moved) == ("1", None, None, True)
    assert champion(store, "first") == "1"


@pytest.mark.parametrize(("value", "passes"), [(0.51, True), (0.5, True), (0.49, False)])
def test_a_lower_score_is_refused_with_both(store: str, value: float, passes: bool) -> None:
    name = f"score {value}"
    promote(version(store, name, 0.5), uri=store)
    made = promote(version(store, name, value), uri=store)
    assert champion(store, name) == made.version == ("2" if passes else "1")
    assert made.refused == (None if passes else "it has test/map 0.4900, the champion test/map 0.5000")


def test_a_sweeps_winner_must_beat_the_champion(store: str) -> None:
    promote(version(store, "beat", 0.5), uri=store)
    again = version(store, "beat", 0.5)
    assert not promote(again, uri=store, must_beat=True).moved
    assert promote(again, uri=store).moved


def test_another_dataset_is_refused_with_both_hashes_however_good(store: str) -> None:
    promote(version(store, "data", 0.5), uri=store)
    made = promote(version(store, "data", 0.9, dataset=OTHER), uri=store)
    assert made.refused is not None and "dataset bbbbbbbbbbbb, the champion on aaaaaaaaaaaa" in made.refused
    assert champion(store, "data") == "1"


def test_another_split_is_refused(store: str) -> None:
    promote(version(store, "splits", 0.5), uri=store)
    made = promote(version(store, "splits", 0.9, split="val"), uri=store)
    assert made.refused is not None and "val/map 0.9000, the champion on test/map 0.5000" in made.refused


def test_force_asks_for_nothing(store: str) -> None:
    promote(version(store, "force", 0.5), uri=store)
    assert promote(version(store, "force", 0.1), uri=store, force=True).moved
    assert promote(version(store, "force", 0.1, dataset=OTHER), uri=store, force=True).moved
    assert champion(store, "force") == "3"


def test_force_does_without_a_score_and_says_so(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has no files, so that nothing can measure it."""
    promote(version(store, "blind", 0.5), uri=store)
    unknown = version(store, "blind", None)
    with pytest.raises(InputError, match="the files of models:/blind/2 can't be fetched"):
        promote(unknown, uri=store, overrides=[f"tracking.uri={store}"])
    made = promote(unknown, uri=store, overrides=[f"tracking.uri={store}"], force=True)
    assert made.moved and made.score is None
    assert "promoted without a score" in capsys.readouterr().err


def test_a_challenger_has_no_gate(store: str) -> None:
    promote(version(store, "ring", 0.5), uri=store)
    assert promote(version(store, "ring", 0.1), uri=store, alias="challenger").moved
    assert champion(store, "ring") == "1"
    assert registry.find(store, "ring@challenger").version == "2"


def test_who_is_champion_stays_it_without_a_word(store: str) -> None:
    made = version(store, "stays", 0.5)
    promote(made, uri=store)
    again = promote(made, uri=store)
    assert (again.version, again.moved, again.refused) == ("1", False, None)
    assert registry.former(store, "stays", "champion") == []


def test_a_champion_of_other_images_is_measured_again_when_asked(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sweep over a new dataset does; the measuring itself is the evaluation's, and has tests there."""
    promote(version(store, "again", 0.9, dataset=OTHER), uri=store)
    measured = []

    def measure(run: str, split: str | None, overrides: object) -> Score:
        measured.append((run, split))
        return Score(value=0.4, split="test", dataset_hash=SAME)

    monkeypatch.setattr(promotion, "measure", measure)
    made = promote(version(store, "again", 0.5), uri=store, again=True, must_beat=True)
    assert made.moved and made.former_score == Score(value=0.4, split="test", dataset_hash=SAME)
    assert measured == [("models:/again/1", "test")]


def test_a_version_is_not_moved_to_another_model(store: str) -> None:
    made = version(store, "mine", 0.5)
    with pytest.raises(InputError, match="is one of 'mine' already: to have it in 'yours' too, name its run"):
        promote(made, uri=store, name="yours")
