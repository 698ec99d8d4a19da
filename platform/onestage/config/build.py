"""Objects from plain config nodes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from onestage.errors import InputError

ALLOWED: Final = (
    *(
        f"onestage.{room}."
        for room in ("detectors", "nn", "anchors", "assign", "losses", "data", "metrics", "training")
    ),
    "torch.nn.",
    "torch.optim.",
    "torchvision.transforms.v2.",
    "pytorch_lightning.callbacks.",
    "torchmetrics.detection.",
)
"""What ``_target_`` may name: a wider list would let a config run any command."""


def build(node: Mapping[str, Any]) -> Any:
    """The object that ``node`` describes by ``_target_``, with everything below it; lists and dicts stay plain.

    Raises InputError for a target that is not a class under ``ALLOWED``, before anything is called, and for values
    or keys that a constructor refuses.
    """
    for target in _targets(node):
        _check(target)
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        # A constructor that refuses its values says why in one line, Python itself which keys it does not take.
        if isinstance(cause, ValueError) or (isinstance(cause, TypeError) and "keyword argument" in str(cause)):
            raise InputError(str(cause)) from error
        raise


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _targets(value)


def _check(target: Any) -> None:
    """Looks at where the class is defined, too: `torch.nn.functional.torch.hub.load` also begins with torch.nn."""
    allowed = ", ".join(prefix + "*" for prefix in ALLOWED)
    if not isinstance(target, str) or not target.startswith(ALLOWED):
        raise InputError(f"_target_ {target!r} is not allowed; a class may come from {allowed}")
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:
        raise InputError(f"_target_ {target!r} names nothing: {str(error).splitlines()[0]}") from error
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(ALLOWED):
        raise InputError(f"_target_ {target!r} is not allowed; a class may come from {allowed}")
