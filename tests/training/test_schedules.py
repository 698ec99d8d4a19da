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


@pytest.mark.parametrize("milestones", [[0.9, 0.8], [0.0], [1.0]])
def test_milestones_must_rise_within_the_training(milestones: list[float]) -> None:
    with pytest.raises(InputError, match=r"schedule\.milestones"):
        WarmupSteps(warmup_epochs=0.0, milestones=milestones, factor=0.1)
