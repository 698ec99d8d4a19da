import torch

from onestage.anchors.grid import cells


def test_the_column_comes_first_then_the_row() -> None:
    assert cells(2, 3).tolist() == [[[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]]]


def test_flattened_it_is_the_order_of_a_flattened_map() -> None:
    height, width = 4, 7
    numbers = torch.arange(height * width).view(1, height, width).flatten()
    columns, rows = cells(height, width).flatten(0, 1).unbind(dim=1)
    assert torch.equal(rows * width + columns, numbers.float())


def test_floats_to_add_to_offsets() -> None:
    assert cells(1, 1).dtype == torch.float32
