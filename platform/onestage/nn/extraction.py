"""YOLOv1's backbones (arXiv:1506.02640, Sec. 2.1). One map each, at stride 64."""

from typing import Final

from torch import nn

from onestage.nn.blocks import ACTIVATIONS, LEAKY_SLOPE, ConvBlock, scaled


class Extraction(nn.Sequential):
    """The 24 convolutions of Fig. 3; the first 20 are Darknet's Extraction, the classifier it is pretrained as.

    Without ``norm`` as in the paper: then it starts from He's initialisation (arXiv:1502.01852), without which no
    signal would reach the end of 24 layers. With ``norm`` as in Darknet's yolov1.cfg.
    """

    STAGES: Final = (  # (channels, kernel), max pooling in between
        ((64, 7),),
        ((192, 3),),
        ((128, 1), (256, 3), (256, 1), (512, 3)),
        (*((256, 1), (512, 3)) * 4, (512, 1), (1024, 3)),
        (*((512, 1), (1024, 3)) * 2, (1024, 3), (1024, 3), (1024, 3), (1024, 3)),
    )
    HALVING: Final = (1, 22)  # the convolutions of stride 2

    def __init__(self, *, width: float = 1.0, norm: bool = True) -> None:
        super().__init__()
        self.stride = 64
        block = ConvBlock if norm else PlainBlock
        channels, number = 3, 0
        for stage in self.STAGES:
            if number > 0:
                self.append(nn.MaxPool2d(2))
            for paper_channels, kernel in stage:
                number += 1
                inputs, channels = channels, scaled(paper_channels, width)
                self.append(block(inputs, channels, kernel=kernel, stride=2 if number in self.HALVING else 1))
        self.channels = channels


class PlainBlock(nn.Sequential):
    """Convolution with bias, leaky: a ``ConvBlock`` of before batch norm."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int) -> None:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        nn.init.kaiming_normal_(convolution.weight, a=LEAKY_SLOPE)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        super().__init__(convolution, ACTIVATIONS["leaky"]())


class ExtractionTiny(nn.Sequential):
    """The eight convolutions of Darknet's ``yolov1-tiny.cfg``: six followed by max pooling, and two."""

    CHANNELS: Final = (16, 32, 64, 128, 256, 512, 1024, 256)

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        self.stride = 64
        channels = [scaled(c, width) for c in self.CHANNELS]
        for inputs, outputs in zip([3, *channels], channels, strict=False):
            self.append(ConvBlock(inputs, outputs, kernel=3))
            if len(self) < 12:
                self.append(nn.MaxPool2d(2))
        self.channels = channels[-1]
