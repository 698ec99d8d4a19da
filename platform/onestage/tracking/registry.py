"""Models with a name: their versions, which alias which of them has, and which had it before."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, TypeVar

from onestage.errors import InputError
from onestage.tracking.client import client, missing, refused
from onestage.tracking.redaction import redact
from onestage.tracking.runs import logged_model

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
FORMER_TAG: Final = "onestage.former."
"""With an alias behind it, a tag of the model: the versions that had the alias, the latest last."""
MOST_FORMER: Final = 50
PAGE: Final = 200

_VERSION: Final = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+))")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A registered model's version; ``tags`` say among others what it scored, on which data."""

    name: str
    version: str
    run_id: str | None
    tags: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    created: float = 0.0  # seconds since 1970

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def names(uri: str) -> list[str]:
    """The registered models of a store."""
    return sorted(one.name for one in _models(uri))


def versions(uri: str, name: str | None = None) -> list[Version]:
    """Those of the model ``name``, or of all: by name, the newest first. Raises InputError where there is no such."""
    models = _models(uri) if name is None else [_model(uri, name)]
    return [
        _read(one, model)
        for model in sorted(models, key=lambda one: str(one.name))
        for one in sorted(_versions(uri, model.name), key=lambda one: -int(one.version))
    ]


def find(uri: str, reference: str) -> Version:
    """The version called ``models:/NAME/VERSION``, ``NAME/VERSION`` or ``NAME@ALIAS``. Raises InputError."""
    named = _VERSION.fullmatch(reference)
    if named is None:
        raise InputError(f"{reference!r} names no version of a model: write NAME/VERSION or NAME@ALIAS")
    model = _model(uri, named["name"])
    held = ", ".join(f"@{alias} is version {version}" for alias, version in sorted(model.aliases.items()))
    version = named["version"] or model.aliases.get(named["alias"])
    if version is None:
        raise InputError(f"model {model.name!r} has no alias {named['alias']!r}: {held or 'it has none yet'}")
    try:
        return _read(client(uri).get_model_version(model.name, str(version)), model)
    except Exception as error:
        if not (missing(error) or refused(error)):
            raise
        there = ", ".join(one.version for one in versions(uri, model.name)[:8]) or "none"
        raise InputError(f"model {model.name!r} has no version {version}: it has {there}") from error


def holder(uri: str, name: str, alias: str = CHAMPION) -> Version | None:
    """The version of model ``name`` with that alias; None where there is none, or no such model."""
    model = _held(lambda: client(uri).get_registered_model(name))
    if model is None or alias not in model.aliases:
        return None
    return _read(client(uri).get_model_version(name, str(model.aliases[alias])), model)


def of_run(uri: str, name: str, run_id: str) -> Version | None:
    """The version of model ``name`` that a run's model is already; None where it isn't one. Raises InputError."""
    logged = logged_model(uri, run_id)
    # The stores drop the model's id; MLflow's own registration has its address as the source, ours its files.
    sources = (logged.artifact_location, logged.model_uri)
    model = _held(lambda: client(uri).get_registered_model(name))
    if model is None:
        return None
    return next((_read(one, model) for one in _versions(uri, name) if one.source in sources), None)


def register(uri: str, name: str, run_id: str) -> Version:
    """Makes a run's model the next version of ``name``, which is made where it's new. Raises InputError."""
    mlflow = client(uri)
    model = logged_model(uri, run_id)
    if _held(lambda: mlflow.get_registered_model(name)) is None:
        try:
            mlflow.create_registered_model(name)
        except Exception as error:
            if not refused(error):
                raise
            raise InputError(f"{name!r} can't name a model: choose another, without / and :") from error
    made = mlflow.create_model_version(name, source=model.artifact_location, run_id=run_id, model_id=model.model_id)
    return _read(made, mlflow.get_registered_model(name))


def tell(uri: str, version: Version, tags: Mapping[str, str]) -> None:
    """Adds tags to a version."""
    for key, value in tags.items():
        client(uri).set_model_version_tag(version.name, version.version, key, value)


def give(uri: str, version: Version, alias: str) -> None:
    """Gives a version the alias, and keeps in mind who had it; a champion is nobody's challenger any more."""
    mlflow = client(uri)
    before = holder(uri, version.name, alias)
    if before is not None and before.version != version.version:
        # Before the alias moves: cut here, the version on top is the one that has the alias, which take_back passes.
        _remember(uri, version.name, alias, [*former(uri, version.name, alias), before.version])
    _set_alias(uri, version, alias)
    if alias == CHAMPION and CHALLENGER in version.aliases:
        mlflow.delete_registered_model_alias(version.name, CHALLENGER)


def take_back(uri: str, name: str, alias: str) -> tuple[Version, Version]:
    """Gives the alias back to the version that had it before: who had it, who has it. InputError where none is left."""
    held = find(uri, f"{name}@{alias}")
    left = former(uri, name, alias)
    there = {one.version: one for one in versions(uri, name)}
    while left:
        version = left.pop()
        if version != held.version and version in there:  # it may have been deleted, or given the alias elsewhere
            _set_alias(uri, there[version], alias)
            _remember(uri, name, alias, left)
            return held, there[version]
    raise InputError(f"no version of {name!r} was {alias} before version {held.version}: promote the one to go back to")


def former(uri: str, name: str, alias: str) -> list[str]:
    """The versions that had the alias before, the latest last."""
    tags = _model(uri, name).tags
    return list(json.loads(tags.get(f"{FORMER_TAG}{alias}", "[]")))


def _remember(uri: str, name: str, alias: str, former: list[str]) -> None:
    client(uri).set_registered_model_tag(name, f"{FORMER_TAG}{alias}", json.dumps(former[-MOST_FORMER:]))


def _set_alias(uri: str, version: Version, alias: str) -> None:
    try:
        client(uri).set_registered_model_alias(version.name, alias, version.version)
    except Exception as error:
        if not refused(error):
            raise
        raise InputError(f"{alias!r} can't be an alias: {str(error).splitlines()[0]}") from error


def _model(uri: str, name: str) -> "RegisteredModel":
    found = _held(lambda: client(uri).get_registered_model(name))
    if found is None:
        known = names(uri)
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known[:8])}" if known else "it has none"
        raise InputError(f"no model {name!r} in {redact(uri)}: {hint}")
    return found


def _held(get: Callable[[], T]) -> T | None:
    """What the store has; None where it says that there is no such, or that there can't be one of that name."""
    try:
        return get()
    except Exception as error:
        if missing(error) or refused(error):
            return None
        raise


def _models(uri: str) -> "list[RegisteredModel]":
    return _pages(lambda token: client(uri).search_registered_models(max_results=PAGE, page_token=token))


def _versions(uri: str, name: str) -> "list[ModelVersion]":
    quote = '"' if "'" in name else "'"
    search = f"name = {quote}{name}{quote}"
    return _pages(lambda token: client(uri).search_model_versions(search, max_results=PAGE, page_token=token))


def _pages(page: Callable[[str | None], Any]) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        some = page(token)
        found += some
        token = some.token
        if not token:
            return found


def _read(one: "ModelVersion", model: "RegisteredModel") -> Version:
    return Version(
        name=str(one.name),
        version=str(one.version),
        run_id=one.run_id or None,
        tags=dict(one.tags),
        aliases=tuple(sorted(alias for alias, version in model.aliases.items() if str(version) == str(one.version))),
        created=one.creation_timestamp / 1000,
    )
