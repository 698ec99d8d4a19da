import pytest
import torch

from onestage.losses.mining import hard_negatives


def test_the_highest_losses_in_each_image_by_hand() -> None:
    loss = torch.tensor([[5.0, 1, 4, 2, 3, 0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    positive = torch.tensor([[True, False, False, False, False, False], [False, True, False, False, False, True]])
    chosen = hard_negatives(loss, positive, ratio=2)
    assert chosen.nonzero().tolist() == [[0, 2], [0, 4], [1, 0], [1, 2], [1, 3], [1, 4]]


@pytest.mark.parametrize(("ratio", "num"), [(1, 10), (3, 30), (2.5, 25), (0, 0)])
def test_as_many_for_each_positive_as_the_ratio_says(ratio: float, num: int) -> None:
    loss = torch.rand(2, 500, generator=torch.Generator().manual_seed(0))
    positive = torch.zeros(2, 500, dtype=torch.bool)
    positive[0, :10] = True
    chosen = hard_negatives(loss, positive, ratio=ratio)
    assert chosen.sum(dim=1).tolist() == [num, 0]  # an image without positives gets none
    assert not (chosen & positive).any()
    if num:
        assert loss[0][chosen[0]].min() >= loss[0][~chosen[0] & ~positive[0]].max()


def test_no_more_than_there_are_and_never_a_positive() -> None:
    positive = torch.tensor([[True, True, True, False]])
    assert hard_negatives(torch.rand(1, 4), positive, ratio=3).tolist() == [[False, False, False, True]]
    assert not hard_negatives(torch.rand(1, 2), torch.ones(1, 2, dtype=torch.bool), ratio=3).any()


def test_equal_losses_are_not_all_chosen() -> None:
    positive = torch.zeros(1, 100, dtype=torch.bool)
    positive[0, 50] = True
    assert hard_negatives(torch.ones(1, 100), positive, ratio=3).sum() == 3
