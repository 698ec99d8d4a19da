"""Composes, checks and resolves a config on the driver; what leaves this module is a plain dict."""

import contextlib
import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onestage.config.folder import CONF, options
from onestage.errors import InputError

NOISE = ("object_type=", "reference_type=", "Set the environment", "See ")
"""What Hydra and OmegaConf add that says nothing to whoever wrote an override."""


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config ``name`` with Hydra ``overrides``, resolved.

    Raises InputError, in one line, for an unknown key (with the nearest known one), an unknown choice of a group (with
    the list), a value of the wrong type, and ``+new=…`` anywhere but under ``extra``.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from onestage.config.schema import register

    register()
    pairs = [_split(override) for override in overrides]
    for override, (key, _) in zip(overrides, pairs, strict=True):
        if override.startswith("+") and not (key == "extra" or key.startswith(("extra.", "experiment"))):
            raise InputError(f"{override}: new keys go under extra, as +extra.{key}=…")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        groups = [o for o, (key, _) in zip(overrides, pairs, strict=True) if (CONF / key).is_dir()]
        for override, (key, value) in zip(overrides, pairs, strict=True):
            if override in groups and value not in ("null", *options(key)):
                raise InputError(f"no {key} {value!r}; there are: {', '.join(options(key))}")
        try:
            plain = _to_plain(hydra_compose(name, groups))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(first_lines(error)) from error
        known = dict(_leaves(plain))
        for override, (key, value) in zip(overrides, pairs, strict=True):
            if override in groups or key.startswith(("extra", "hydra")):
                continue
            if not _has(plain, key):
                raise InputError(f"no config key {key!r}{_nearest(key, known)}")
            own = [name for name in known if name.startswith(f"{key}.") and not name.endswith("_target_")]
            if own and not override.startswith("~") and value != "null" and not value.startswith(("{", "$")):
                raise InputError(f"{override}: {key} has settings of its own: {', '.join(own)}")
        try:
            config = _to_plain(hydra_compose(name, list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(first_lines(error)) from error
    _check_types(plain, config)
    return _finish(config, overrides)


def merged(*overrides: Sequence[str]) -> list[str]:
    """Several lists of overrides as one; of two for the same key the later counts.

    >>> merged(["detector=yolov3", "seed=1"], ["seed=2"])
    ['detector=yolov3', 'seed=2']
    """
    return list({_split(one)[0]: one for group in overrides for one in group}.values())


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~").split("@")[0], value


def _to_plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    logging.getLogger("hydra").setLevel(logging.WARNING)
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _finish(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Fills in what the environment and the dataset say, where the command line says nothing.

    The overrides go along: a resumed or evaluated run is composed from its own and the new ones.
    """
    config["overrides"] = list(overrides)
    overridden = {_split(override)[0] for override in overrides}
    if "tracking.uri" not in overridden:
        config["tracking"]["uri"] = os.environ.get("MLFLOW_TRACKING_URI") or config["tracking"]["uri"]
    if "tracking.experiment" not in overridden:
        config["tracking"]["experiment"] = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config["tracking"]["experiment"]
    if "cluster.address" not in overridden and config["cluster"]["kind"] == "ray":
        config["cluster"]["address"] = os.environ.get("RAY_ADDRESS") or config["cluster"]["address"]
    manifest = Path(config["data"]["root"] or "") / "dataset.json"
    if config["data"]["root"] and manifest.is_file() and "detector.num_classes" not in overridden:
        # A file that is not a manifest is refused, with the reason, where it is opened as one.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            config["detector"]["num_classes"] = len(json.loads(manifest.read_text())["classes"])
    return config


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _has(node: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return False
    return True


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    group, _, name = key.partition(".")
    part = name.split(".")[0]
    elsewhere = [one for one in options(group) if part and part in OmegaConf.load(CONF / group / f"{one}.yaml")]
    if elsewhere:
        return f"; {group}={' or '.join(elsewhere)} has it"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        last = key.rpartition(".")[2]
        near = [candidate for candidate in known if candidate.rpartition(".")[2] == last][:1]
    return f"; the nearest is {near[0]!r}" if near else "; `onestage train --cfg job` prints all"


def _check_types(default: Any, given: Any, key: str = "") -> None:
    """Holds open nodes to the types of their yaml: a number stays a number, a list stays a list."""
    if isinstance(default, Mapping) and isinstance(given, Mapping):
        for name, value in given.items():
            if name in default and not (not key and name in ("extra", "experiment")):
                _check_types(default[name], value, f"{key}.{name}" if key else str(name))
        return
    if default is None or given is None:
        return
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a group",
    }
    wanted = next(kind for kind in kinds if isinstance(default, kind))
    fits = isinstance(given, wanted) and (wanted is bool or not isinstance(given, bool))
    if not fits and not (wanted is float and type(given) is int):
        raise InputError(f"{key} must be {kinds[wanted]}, got {given!r}")


def quoted(text: str) -> str:
    """A value of an override, such as a path, as Hydra reads it back.

    >>> quoted("s3://b/x"), quoted("my (own) shards")
    ('s3://b/x', "'my (own) shards'")
    """
    return text if re.fullmatch(r"[\w./:@%+~-]+", text) else "'" + text.replace("'", r"\'") + "'"


def first_lines(error: BaseException) -> str:
    """An error of Hydra or OmegaConf, and its cause, in one line."""
    cause = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    kept: list[str] = []
    for line in lines:
        words = line.removeprefix("full_key: ")
        if not words.startswith(NOISE) and not any(words in one for one in kept):
            kept.append(words)
    return "; ".join(kept)
