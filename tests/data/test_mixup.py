from collections.abc import Callable

import numpy as np
import pytest
import torch

from onestage.data.mixup import MixUp
from onestage.data.transforms import Augment, Letterbox, Sample, image_of, pixels_of

SampleOf = Callable[..., Sample]


def filled(sample: Sample, level: int) -> Sample:
    """The sample, its image of one level, its labels from that level on."""
    pixels = np.full_like(pixels_of(sample["image"]), level)
    return {**sample, "image": image_of(pixels), "labels": sample["labels"] + level}


def mixed(mixup: MixUp, samples: list[Sample], *, seed: int, epoch: int = 0) -> Sample:
    return Augment(transforms=[mixup])(samples[0], seed=seed, epoch=epoch, others=samples[1:])


def test_both_images_are_blended_and_keep_their_boxes(sample_of: SampleOf) -> None:
    samples = [filled(sample_of(), 0), filled(sample_of(160, 100, times=2), 200)]
    fitted = [Letterbox(size=[80, 80], fill=0)(one) for one in samples]
    shares = []
    for seed in range(100):
        out = mixed(MixUp(size=[80, 80], probability=1.0, alpha=2.0), samples, seed=seed)
        assert out["image"].shape == (3, 80, 80)
        assert out["key"] == "000001"
        assert out["labels"].tolist() == [0, 1, 2, 200, 201, 202]
        assert out["crowd"].tolist() == [False, False, True] * 2
        assert out["difficult"].tolist() == [True, False, False] * 2
        expected = torch.cat([one["boxes"].as_subclass(torch.Tensor) for one in fitted])
        assert torch.equal(out["boxes"].as_subclass(torch.Tensor), expected)
        middle = pixels_of(out["image"])[40, 40]
        assert (middle == middle[0]).all()
        shares.append(1 - middle[0] / 200)
    # Beta(2, 2) has a mean of a half and a variance of 1 / 20.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.07)
    assert np.var(shares) == pytest.approx(0.05, abs=0.015)


def test_the_share_is_the_samples_own(sample_of: SampleOf) -> None:
    """Everywhere the same: each pixel lies as far between the two letterboxed images as its neighbours."""
    samples = [sample_of(), filled(sample_of(), 77)]
    fitted = [pixels_of(Letterbox(size=[100, 120])(one)["image"]).astype(float) for one in samples]
    out = pixels_of(mixed(MixUp(size=[100, 120], probability=1.0), samples, seed=4)["image"])
    share = 1 - out[0, 0, 0] / 77  # black there in the first
    assert 0.1 < share < 0.9
    assert np.abs(out - (share * fitted[0] + (1 - share) * fitted[1])).max() <= 3


def test_the_other_is_any_of_the_batch(sample_of: SampleOf) -> None:
    samples = [filled(sample_of(), 10 * index) for index in range(6)]
    found = {int(mixed(MixUp(size=[50, 50], probability=1.0), samples, seed=seed)["labels"][3]) for seed in range(60)}
    assert found == {10, 20, 30, 40, 50}


def test_a_sample_of_the_canvas_is_not_resized_again(sample_of: SampleOf) -> None:
    """So that it may come behind a mosaic."""
    samples = [sample_of(), filled(sample_of(), 0)]
    out = mixed(MixUp(size=[100, 120], probability=1.0), samples, seed=1)
    assert torch.equal(out["boxes"][:3], samples[0]["boxes"])


def test_alone_or_by_chance_it_stays_as_it_is(sample_of: SampleOf) -> None:
    mixup = MixUp(size=[50, 50], probability=0.3)
    assert mixed(MixUp(size=[50, 50], probability=1.0), [sample_of()], seed=0)["image"].shape == (3, 100, 120)
    made = sum(len(mixed(mixup, [sample_of(), sample_of()], seed=seed)["labels"]) == 6 for seed in range(200))
    assert 40 < made < 80


@pytest.mark.parametrize(("epoch", "made"), [(0, True), (6, True), (7, False), (9, False)])
def test_off_in_the_last_epochs(epoch: int, made: bool, sample_of: SampleOf) -> None:
    mixup = MixUp(size=[50, 50], probability=1.0, num_epochs=10, plain_epochs=3)
    assert (len(mixed(mixup, [sample_of(), sample_of()], seed=0, epoch=epoch)["labels"]) == 6) == made


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need alpha > 0, got 0"):
        MixUp(size=[64, 64], alpha=0)
    with pytest.raises(ValueError, match=r"plain_epochs=5 needs an end to count from: set trainer.max_epochs"):
        MixUp(size=[64, 64], plain_epochs=5)
    with pytest.raises(ValueError, match=r"need plain_epochs >= 0, got -1"):
        MixUp(size=[64, 64], plain_epochs=-1)
