"""Which model is the champion, in a real store."""

from pathlib import Path

import pytest

from onestage.errors import InputError
from onestage.tracking import registry, runs


def test_no_such_model_has_no_champion(store: str) -> None:
    assert registry.champion(store, "nobody") is None


def test_a_run_without_a_model_can_not_be_crowned(store: str) -> None:
    run_id = runs.open_run(store, "crowns", name="one", tags={})
    with pytest.raises(InputError, match="has logged no model"):
        registry.crown(store, "cells", run_id, tags={})
    assert registry.champion(store, "cells") is None


def test_the_alias_moves_to_the_next_version(store: str, tmp_path: Path) -> None:
    from onestage.tracking.client import client

    made = []
    for score in ("0.5", "0.6"):
        run_id = runs.open_run(store, "crowns", name=score, tags={})
        experiment = client(store).get_run(run_id).info.experiment_id
        model = client(store).create_logged_model(experiment, name="model", source_run_id=run_id)
        client(store).finalize_logged_model(model.model_id, "READY")
        made.append(registry.crown(store, "alias", run_id, tags={"onestage.score": score}))
    champion = registry.champion(store, "alias")
    assert champion is not None
    assert [one.version for one in made] == ["1", "2"]
    assert (champion.version, champion.run_id, champion.tags["onestage.score"]) == ("2", made[1].run_id, "0.6")
    assert champion.uri == "models:/alias/2"
