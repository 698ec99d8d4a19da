"""Which version of a model has which alias, and which had it before, in a real store."""

import pytest

from onestage.errors import InputError
from onestage.tracking import registry, runs
from onestage.tracking.client import client


def logged(store: str) -> str:
    """A run with a finished model."""
    run_id = runs.open_run(store, "crowns", name="one", tags={})
    experiment = client(store).get_run(run_id).info.experiment_id
    model = client(store).create_logged_model(experiment, name="model", source_run_id=run_id)
    client(store).finalize_logged_model(model.model_id, "READY")
    return run_id


def crowned(store: str, name: str, number: int) -> list[registry.Version]:
    """So many versions, each of which was the champion for a while."""
    made = []
    for _ in range(number):
        made.append(registry.register(store, name, logged(store)))
        registry.give(store, made[-1], registry.CHAMPION)
    return made


def champion(store: str, name: str) -> str | None:
    held = registry.holder(store, name)
    return None if held is None else held.version


def test_no_such_model_has_no_champion(store: str) -> None:
    assert registry.holder(store, "nobody") is None


def test_a_run_without_a_model_can_not_be_registered(store: str) -> None:
    run_id = runs.open_run(store, "crowns", name="one", tags={})
    with pytest.raises(InputError, match="has logged no model"):
        registry.register(store, "cells", run_id)
    assert "cells" not in registry.names(store)


def test_the_alias_moves_to_the_next_version(store: str) -> None:
    first, second = crowned(store, "alias", 2)
    held = registry.holder(store, "alias")
    assert held is not None
    assert (first.version, second.version) == ("1", "2")
    assert (held.version, held.run_id, held.aliases, held.uri) == ("2", second.run_id, ("champion",), "models:/alias/2")


def test_the_alias_goes_back_one_version_at_a_time(store: str) -> None:
    crowned(store, "back", 3)
    assert [registry.take_back(store, "back", "champion")[1].version for _ in range(2)] == ["2", "1"]
    with pytest.raises(InputError, match="no version of 'back' was champion before version 1"):
        registry.take_back(store, "back", "champion")
    assert champion(store, "back") == "1"


def test_a_version_that_was_champion_twice_is_gone_back_to_twice(store: str) -> None:
    first, _ = crowned(store, "twice", 2)
    registry.give(store, first, registry.CHAMPION)
    assert [registry.take_back(store, "twice", "champion")[1].version for _ in range(2)] == ["2", "1"]
    with pytest.raises(InputError):
        registry.take_back(store, "twice", "champion")


def test_what_was_deleted_or_moved_by_hand_is_passed_over(store: str) -> None:
    crowned(store, "hands", 4)
    client(store).delete_model_version("hands", "3")
    client(store).set_registered_model_alias("hands", "champion", "2")
    assert registry.take_back(store, "hands", "champion")[1].version == "1"


def test_a_promoted_challenger_is_none_any_more(store: str) -> None:
    crowned(store, "ring", 1)
    second = registry.register(store, "ring", logged(store))
    registry.give(store, second, registry.CHALLENGER)
    second = registry.find(store, "ring@challenger")
    registry.give(store, second, registry.CHAMPION)
    assert registry.find(store, "ring/2").aliases == ("champion",)
    assert registry.take_back(store, "ring", "champion")[1].version == "1"


def test_a_run_is_known_by_its_model_however_that_was_registered(store: str) -> None:
    ours = registry.register(store, "known", logged(store))
    by_hand = logged(store)
    source = runs.logged_model(store, by_hand)
    client(store).create_model_version("known", source.artifact_location, by_hand)
    assert ours.run_id is not None
    found = [registry.of_run(store, "known", run) for run in (ours.run_id, by_hand, logged(store))]
    assert [one and one.version for one in found] == ["1", "2", None]


@pytest.mark.parametrize("name", ["it's", 'in "quotes"', "with blanks", "ünïcode"])
def test_names_as_people_write_them(store: str, name: str) -> None:
    crowned(store, name, 2)
    assert [one.version for one in registry.versions(store, name)] == ["2", "1"]
    assert name in registry.names(store)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("lists/9", "'lists' has no version 9: it has 2, 1"),
        ("list/1", "no model 'list' .*did you mean 'lists'"),
        ("lists@challenger", "no alias 'challenger': @champion is version 2"),
        ("lists", "write NAME/VERSION or NAME@ALIAS"),
        ("a/b/c", "write NAME/VERSION or NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(store: str, reference: str, said: str) -> None:
    if "lists" not in registry.names(store):
        crowned(store, "lists", 2)
    with pytest.raises(InputError, match=said):
        registry.find(store, reference)


@pytest.mark.parametrize("alias", ["v1", "two words", "latest"])
def test_aliases_that_mlflow_forbids_are_one_line(store: str, alias: str) -> None:
    version = registry.register(store, "forbidden", logged(store))
    with pytest.raises(InputError, match="can't be an alias"):
        registry.give(store, version, alias)


def test_names_that_mlflow_forbids_are_one_line(store: str) -> None:
    with pytest.raises(InputError, match="can't name a model"):
        registry.register(store, "a/b", logged(store))
