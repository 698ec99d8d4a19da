import torch
from torch import nn
from torchvision.models import vgg16
from torchvision.models.vgg import make_layers

from onestage.nn.vgg import VGG16

MEAN, STD = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)


def narrow() -> VGG16:
    torch.manual_seed(0)
    return VGG16(image_mean=MEAN, image_std=STD, width=0.125).eval()


def test_maps_of_conv4_3_and_fc7() -> None:
    backbone = narrow()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 300, 300))
    assert [tuple(x.shape) for x in maps] == [(2, 64, 38, 38), (2, 128, 19, 19)]
    assert backbone.channels == (64, 128)


def test_equals_torchvision_layer_by_layer() -> None:
    """The 13 convolutions; the third pooling rounds up, so that an odd map of 75 gives 38."""
    backbone = narrow()
    stages = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64]
    reference = make_layers(stages).eval()  # type: ignore[arg-type]
    reference[16].ceil_mode = True
    state = {f"features.{name}": value for name, value in reference.state_dict().items()}
    layers = backbone.torchvision_layers()
    assert {f"{name}.{key}" for name in layers for key in ("weight", "bias")} == set(state)
    with torch.no_grad():
        for name, layer in layers.items():
            assert isinstance(layer, nn.Conv2d)
            layer.weight.copy_(state[f"{name}.weight"])
            layer.bias.copy_(state[f"{name}.bias"])  # type: ignore[union-attr]
        image = torch.rand(1, 3, 75, 75)
        normalised = (image - torch.tensor(MEAN).view(3, 1, 1)) * 255
        conv4_3 = backbone(image)[0]
        torch.testing.assert_close(conv4_3, reference[:23](normalised))
        torch.testing.assert_close(backbone.to_conv5_3(conv4_3), reference(normalised))


def test_names_and_shapes_are_those_of_torchvisions_vgg16() -> None:
    with torch.device("meta"):
        expected = {k: v.shape for k, v in vgg16(weights=None, init_weights=False).state_dict().items()}
        layers = VGG16(image_mean=MEAN, image_std=STD).torchvision_layers()
    found = {f"{name}.{key}": v.shape for name, layer in layers.items() for key, v in layer.state_dict().items()}  # type: ignore[union-attr]
    assert found == {name: shape for name, shape in expected.items() if name.startswith("features")}


def test_a_photograph_keeps_its_size_of_signal_through_all_layers_at_birth() -> None:
    """Without batch norm nothing else does: pixels up to 255 would make logits of hundreds."""
    torch.manual_seed(0)
    backbone = VGG16(image_mean=MEAN, image_std=STD, width=0.25).eval()
    with torch.no_grad():
        for x in backbone(0.45 + 0.25 * torch.randn(1, 3, 128, 128)):
            assert 0.2 < x.square().mean().sqrt() < 5
