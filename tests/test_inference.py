from typing import Any, cast

import numpy as np
import pytest
import torch

from onestage.detectors.base import OneStageDetector
from onestage.inference import Predictor
from onestage.types import XYXY, Detections


class FindsWhite(torch.nn.Module):
    """Of each image the box of what is bright, in the input's pixels."""

    input_size = (40, 40)

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 40, 40)
        return images

    def detect(self, images: torch.Tensor) -> list[Detections]:
        found = []
        for image in images:
            rows, columns = (image.amin(dim=0) > 0.75).nonzero().unbind(dim=1)
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            found.append(Detections(XYXY(box[None]), torch.ones(1), torch.zeros(1, dtype=torch.int64)))
        return found


@pytest.mark.parametrize("data", [{}, {"fit": "letterbox"}, {"fit": "stretch"}])
@pytest.mark.parametrize("shape", [(80, 160), (20, 30), (40, 40)])
def test_boxes_are_in_the_images_own_pixels_however_it_was_fitted(data: dict[str, Any], shape: tuple[int, int]) -> None:
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 4 : height // 2, width // 2 :] = 255
    detector = cast(OneStageDetector, FindsWhite())
    predictor = Predictor(detector, ["white"], {"detector": {}, "data": data}, [], 0.5)
    (found,) = predictor([image])
    pixel = max(height, width) / 40 + 0.5
    expected = [width / 2, height / 4, width, height / 2]
    assert np.abs(np.subtract(found.boxes[0].tolist(), expected)).max() <= pixel


def test_an_unknown_fit_is_named() -> None:
    predictor = Predictor(cast(OneStageDetector, FindsWhite()), ["white"], {"data": {"fit": "crop"}}, [], 0.5)
    with pytest.raises(ValueError, match=r"need data.fit to be one of letterbox, stretch, got 'crop'"):
        predictor([np.zeros((8, 8, 3), np.uint8)])
