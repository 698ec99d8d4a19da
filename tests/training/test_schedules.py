"""Schedules are functions of the epoch; expected values by hand."""

import pytest

from onestage.errors import InputError
from onestage.training.schedules import WarmupCosine, WarmupSteps


def test_cosine_starts_warm_peaks_after_warmup_and_ends_at_final() -> None:
    schedule = WarmupCosine(warmup_epochs=2.0, final=0.1)
    assert schedule(1.0, 10.0) == pytest.approx(0.5**4)
    assert schedule(2.0, 10.0) == pytest.approx(1.0)
    assert schedule(6.0, 10.0) == pytest.approx((1.0 + 0.1) / 2)
    assert schedule(10.0, 10.0) == pytest.approx(0.1)


def test_a_training_shorter_than_the_warmup_reaches_its_full_rate() -> None:
    assert WarmupCosine(warmup_epochs=5.0, final=0.0)(1.0, 2.0) == pytest.approx(1.0)


def test_steps_fall_at_shares_of_the_training() -> None:
    schedule = WarmupSteps(warmup_epochs=0.0, milestones=[0.5, 0.75], factor=0.1)
    assert [schedule(epoch, 8.0) for epoch in (0.0, 3.9, 4.0, 6.0)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_milestones_from_one_on_are_epochs_whatever_the_length() -> None:
    schedule = WarmupSteps(warmup_epochs=0.0, milestones=[60, 90], factor=0.1)
    for num_epochs in (100.0, 160.0):
        assert [schedule(epoch, num_epochs) for epoch in (59.9, 60.0, 90.0)] == pytest.approx([1.0, 0.1, 0.01])


def test_yolov1_raises_its_rate_and_holds_it_for_75_30_and_30_epochs() -> None:
    """arXiv:1506.02640 Sec. 2.2: 0.001 to 0.01, then 75 epochs, 30 at 0.001 and 30 at 0.0001."""
    schedule = WarmupSteps(warmup_epochs=2.0, warmup_start=0.1, warmup_power=1.0, milestones=[75, 105], factor=0.1)
    rates = [0.01 * schedule(epoch, 135.0) for epoch in (0.0, 1.0, 2.0, 74.0, 76.0, 104.0, 106.0, 135.0)]
    assert rates == pytest.approx([0.001, 0.0055, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_burn_in_is_the_fourth_power_and_linear_is_linear(share: float) -> None:
    """Darknet: rate * (batch / burn_in) ** 4; Detectron: from a third, in a straight line."""
    burn_in = WarmupCosine(warmup_epochs=0.5, final=0.0)
    linear = WarmupCosine(warmup_epochs=0.5, final=0.0, warmup_start=1 / 3, warmup_power=1.0)
    assert burn_in(share * 0.5, 100.0) == pytest.approx((share * 1000 / 1000) ** 4)
    assert linear(share * 0.5, 100.0) == pytest.approx(1 / 3 * (1 - share) + share)


@pytest.mark.parametrize("milestones", [[0.9, 0.8], [0.0], [0.5, 60], [90, 60], [-1]])
def test_milestones_must_rise_as_shares_or_as_epochs(milestones: list[float]) -> None:
    with pytest.raises(InputError, match=r"schedule\.milestones must rise") as caught:
        WarmupSteps(warmup_epochs=0.0, milestones=milestones, factor=0.1)
    assert str(milestones) in str(caught.value)


@pytest.mark.parametrize("wrong", [{"warmup_epochs": -1}, {"warmup_start": 1.5}, {"warmup_power": 0}])
def test_a_warmup_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"need schedule\.warmup_epochs >= 0"):
        WarmupCosine(**({"warmup_epochs": 1.0, "final": 0.0} | wrong))
