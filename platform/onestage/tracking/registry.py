"""Models with a name: which version is the champion, and the making of a new one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from onestage.tracking.client import client, missing
from onestage.tracking.runs import logged_model

CHAMPION: Final = "champion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A registered model's version; ``tags`` say among others what it scored, on which data."""

    name: str
    version: str
    run_id: str | None
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def champion(uri: str, name: str) -> Version | None:
    """The version of model ``name`` with the alias ``champion``; None where there is none."""
    try:
        found = client(uri).get_model_version_by_alias(name, CHAMPION)
    except Exception as error:
        # A name without that alias, and no such name at all, are told as errors of two kinds.
        if missing(error) or "not found" in str(error).lower():
            return None
        raise
    return Version(name=name, version=str(found.version), run_id=found.run_id, tags=dict(found.tags))


def crown(uri: str, name: str, run_id: str, *, tags: Mapping[str, str]) -> Version:
    """Registers a run's model as the next version of ``name``, and gives that the alias. Raises InputError."""
    mlflow = client(uri)
    model = logged_model(uri, run_id)
    if not mlflow.search_registered_models(f"name = '{name}'"):
        mlflow.create_registered_model(name)
    made = mlflow.create_model_version(
        name, source=model.artifact_location, run_id=run_id, model_id=model.model_id, tags=dict(tags)
    )
    mlflow.set_registered_model_alias(name, CHAMPION, made.version)
    return Version(name=name, version=str(made.version), run_id=run_id, tags=tags)
