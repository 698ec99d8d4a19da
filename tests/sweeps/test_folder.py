"""What a sweep leaves on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onestage.sweeps.folder import SETUP, Setup, kept
from onestage.tracking.tracker import store_uri

ADDRESS = "http://ann:hunter2@host:5000"


def test_the_password_of_a_store_is_used_and_not_written(
    sweep_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    overrides = kept(["seed=1,2", f"tracking.uri={ADDRESS}"])
    assert overrides == ["seed=1,2", "tracking.uri=http://host:5000"]
    # Composed from those, in this process or a trial's, it is the whole address again.
    uri = store_uri({"tracking": {"kind": "mlflow", "uri": "http://host:5000"}})
    assert uri == ADDRESS
    folder = sweep_folder({}, overrides=overrides, tracking_uri=uri)
    assert "hunter2" not in (folder / SETUP).read_text()
    assert json.loads((folder / SETUP).read_text())["tracking_uri"] == "http://host:5000"
    assert Setup.load(folder).tracking_uri == ADDRESS


def test_an_address_without_a_password_stays_what_it_was(
    sweep_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    assert kept(["tracking.uri=http://other:5000"]) == ["tracking.uri=http://other:5000"]
    assert Setup.load(sweep_folder({}, tracking_uri="http://other:5000")).tracking_uri == "http://other:5000"
    assert Setup.load(sweep_folder({}, tracking_uri=None)).tracking_uri is None
