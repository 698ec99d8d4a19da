"""Against torchvision's RetinaNetHead."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead

from onestage.nn.retina import RetinaHead


@pytest.mark.parametrize("group_norm", [False, True])
def test_maps_are_torchvisions(group_norm: bool) -> None:
    theirs = RetinaNetHead(32, 9, 3, norm_layer=partial(nn.GroupNorm, 4) if group_norm else None)
    ours = RetinaHead(32, num_anchors=9, num_classes=3, group_norm=group_norm)
    names = {f"{name}.{key}" for name, layer in ours.torchvision_layers().items() for key in layer.state_dict()}
    assert names == set(theirs.state_dict())
    for value in theirs.parameters():
        nn.init.normal_(value, std=0.1)
    for name, layer in ours.torchvision_layers().items():
        layer.load_state_dict(theirs.get_submodule(name).state_dict())
    levels = [torch.randn(2, 32, 5, 8), torch.randn(2, 32, 3, 4)]
    expected = theirs(levels)
    for maps, name, num_values in zip(ours(levels), ("cls_logits", "bbox_regression"), (3, 4), strict=True):
        flat = [raw.view(2, 9, num_values, -1).permute(0, 3, 1, 2).reshape(2, -1, num_values) for raw in maps]
        torch.testing.assert_close(torch.cat(flat, dim=1), expected[name])


@pytest.mark.parametrize(("channels", "num_groups"), [(256, 32), (128, 16), (32, 4), (8, 1)])
def test_group_norm_keeps_the_papers_eight_channels_a_group(channels: int, num_groups: int) -> None:
    head = RetinaHead(channels, num_anchors=9, num_classes=3, group_norm=True)
    norms = [layer for layer in head.modules() if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [num_groups] * 8


def test_classes_are_born_at_their_prior() -> None:
    head = RetinaHead(16, num_anchors=9, num_classes=3, class_prior=0.2)
    logits, deltas = head([torch.zeros(1, 16, 4, 4)])
    torch.testing.assert_close(logits[0].sigmoid(), torch.full((1, 27, 4, 4), 0.2))
    assert not deltas[0].any()
