"""``_target_`` builds our classes and torch's, and nothing that runs a command."""

import pytest
from torch import nn

from onestage.config import build
from onestage.errors import InputError


def test_builds_what_is_nested_as_plain_containers() -> None:
    built = build({"layers": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}], "plain": [1, 2]})
    assert isinstance(built["layers"][0], nn.Linear)
    assert type(built["plain"]) is list


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.utils.collect_env.run",
        "torch.nn.functional.torch.hub.load",
        "onestage.cli.main",
        "onestage.data.pack.shutil.rmtree",
        "onestage.data.pack.pack",
        "torch.nn.NoSuchThing",
        ["torch.nn.Linear"],
    ],
)
def test_refuses_everything_but_classes_from_the_rooms_for_them(target: object) -> None:
    with pytest.raises(InputError, match="_target_"):
        build({"a": [{"_target_": target}]})
