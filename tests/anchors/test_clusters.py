"""k-means on 1 - IoU: against arithmetic, torchvision's IoU, and every way to part a few boxes."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from onestage.anchors import clusters
from onestage.anchors.clusters import average_iou, best_ious, best_possible_recall, fit, improved

SIDES = st.floats(1, 1000, width=32)


def sizes_of(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float64)


def drawn(n: int, *, seed: int = 0, spread: float = 0.8) -> Tensor:
    """Log-normal sides, wide and tall ones among them."""
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (4 + spread * noise).exp()


def cornered(sizes: Tensor) -> Tensor:
    """As boxes (N, 4) with a common corner."""
    return torch.cat((torch.zeros_like(sizes), sizes), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scores_are_those_of_torchvisions_iou(dtype: torch.dtype) -> None:
    sizes, anchors = drawn(500).to(dtype), drawn(7, seed=1).to(dtype)
    best = box_iou(cornered(sizes), cornered(anchors)).amax(dim=1)
    torch.testing.assert_close(best_ious(sizes, anchors).to(dtype), best)
    assert average_iou(sizes, anchors) == pytest.approx(float(best.mean()), abs=1e-6)
    for threshold in (0.25, 0.5, 0.75):
        expected = float((best >= threshold).float().mean())
        assert best_possible_recall(sizes, anchors, threshold=threshold) == pytest.approx(expected)


def test_an_iou_of_just_the_threshold_is_recalled() -> None:
    """1x2 and 2x1 share half the area of 1x1 with the square of 1; 2x2 a quarter."""
    sizes = sizes_of((1, 2), (2, 1), (2, 2), (1, 1))
    assert best_possible_recall(sizes, sizes_of((1, 1)), threshold=0.5) == 0.75
    assert average_iou(sizes, sizes_of((1, 1))) == (0.5 + 0.5 + 0.25 + 1) / 4


@pytest.mark.parametrize("seed", range(5))
def test_boxes_that_lie_apart_give_their_own_clusters(seed: int) -> None:
    """Each of three sizes many times, unequally often: they meet all boxes fully, as no others do."""
    sizes = torch.cat([sizes_of((10, 20)).repeat(70, 1), sizes_of((200, 90)).repeat(5, 1), sizes_of((64, 64))])
    found = fit(sizes[torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))], 3, seed=seed)
    assert found.tolist() == [[10, 20], [64, 64], [200, 90]]
    assert average_iou(sizes, found) == 1


@pytest.mark.parametrize("seed", range(5))
def test_noise_about_sizes_that_lie_apart_leaves_the_centres_there(seed: int) -> None:
    truth = sizes_of((12, 30), (40, 25), (90, 100), (300, 150))
    noise = torch.randn(4, 200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sizes = (truth[:, None] * (0.05 * noise).exp()).flatten(0, 1)
    torch.testing.assert_close(fit(sizes, 4, seed=seed), truth, rtol=0.02, atol=0)


def by_all_partings(sizes: Tensor, k: int) -> float:
    """The highest average IoU that k of the sizes themselves, or means of any of them, reach: by trying them all."""
    numbers = range(len(sizes))
    groups = [group for n in range(1, len(sizes) + 1) for group in combinations(numbers, n)]
    places = torch.cat([sizes, torch.stack([sizes[list(group)].mean(dim=0) for group in groups])]).unique(dim=0)
    ious = box_iou(cornered(sizes), cornered(places))  # (N, P)
    return max(float(ious[:, list(chosen)].amax(dim=1).mean()) for chosen in combinations(range(len(places)), k))


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_among_means_of_a_few_boxes_is_better(seed: int) -> None:
    sizes = drawn(7, seed=seed)
    assert average_iou(sizes, fit(sizes, 2, seed=0)) >= by_all_partings(sizes, 2) - 5e-3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=3, max_size=40), st.integers(1, 5), st.randoms())
def test_the_average_iou_never_falls(pairs: list[tuple[float, float]], k: int, random: object) -> None:
    """Whatever the centres are, also where some have no box."""
    sizes = sizes_of(*pairs)
    centres = sizes_of(*(random.choice(pairs) for _ in range(k)))  # type: ignore[attr-defined]
    reached = average_iou(sizes, centres)
    for _ in range(4):
        centres = improved(sizes, centres)
        assert average_iou(sizes, centres) >= reached - 1e-12
        reached = average_iou(sizes, centres)


def test_a_centre_without_boxes_takes_the_one_that_fits_worst() -> None:
    sizes = sizes_of((10, 10), (11, 11), (80, 20))
    assert [80, 20] in improved(sizes, sizes_of((10, 10), (10, 10))).tolist()


def test_a_centre_goes_to_its_boxes_median_where_that_is_better_than_their_mean() -> None:
    """2x2 meets the three with (1 + 1 + 4/9) / 3 = 0.81, their mean 7/3 x 7/3 with (2 * 36/49 + 49/81) / 3 = 0.69."""
    assert improved(sizes_of((2, 2), (2, 2), (3, 3)), sizes_of((9, 9))).tolist() == [[2, 2]]


def test_and_to_their_mean_where_that_is_better() -> None:
    """12x12 meets both with 120 / (144 + 140 - 120) = 0.73, the lower median of each side, 10x10, with 100 / 140."""
    assert improved(sizes_of((10, 14), (14, 10)), sizes_of((90, 90))).tolist() == [[12, 12]]


def test_more_clusters_meet_the_boxes_better_as_in_the_papers_figure_2() -> None:
    sizes = drawn(800)
    reached = [average_iou(sizes, fit(sizes, k, seed=0)) for k in (1, 2, 3, 5, 9)]
    assert reached == sorted(reached)
    assert reached[-1] > reached[0] + 0.2


def test_they_come_by_area_and_equal_for_an_equal_seed() -> None:
    sizes = drawn(500)
    first = fit(sizes, 6, seed=3)
    assert torch.equal(first, fit(sizes.clone(), 6, seed=3))
    areas = first.prod(dim=1)
    assert (areas[1:] >= areas[:-1]).all()
    assert first.shape == (6, 2)


def test_they_grow_with_the_boxes() -> None:
    """1 - IoU has no unit."""
    sizes = drawn(300)
    torch.testing.assert_close(fit(4 * sizes, 4, seed=0), 4 * fit(sizes, 4, seed=0))


def test_of_many_boxes_all_count_and_not_just_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size in a thousand is in no sample of 50, but it is the one that fits worst, and k is enough for it."""
    common = sizes_of((20, 20), (50, 50)).repeat(1000, 1)
    sizes = torch.cat((common, sizes_of((400, 30), (400, 30))))
    monkeypatch.setattr(clusters, "SEEDING_BOXES", 50)
    assert fit(sizes, 3, seed=0).tolist() == [[20, 20], [50, 50], [400, 30]]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = drawn(300)
    whole = fit(sizes, 5, seed=0)
    monkeypatch.setattr(clusters, "CHUNK_BOXES", 7)
    torch.testing.assert_close(fit(sizes, 5, seed=0), whole)


@pytest.mark.parametrize(
    ("sizes", "k", "said"),
    [
        (sizes_of((3, 4), (5, 6)), 0, "need k >= 1, got 0"),
        (sizes_of((3, 4)), 2, "need at least k = 2 sizes, all of them finite and above 0, got 1"),
        (sizes_of((3, 4), (0, 6)), 1, "finite and above 0"),
        (sizes_of((3, 4), (float("nan"), 6)), 1, "finite and above 0"),
        (sizes_of((3, 4), (3, 4), (5, 6)), 3, "3 anchors need as many boxes of different sizes"),
    ],
)
def test_what_has_no_clusters_is_refused(sizes: Tensor, k: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(sizes, k, seed=0)


@pytest.mark.slow
def test_a_million_boxes_take_seconds() -> None:
    import time

    sizes = drawn(1_000_000)
    start = time.monotonic()
    found = fit(sizes, 9, seed=0)
    assert time.monotonic() - start < 120  # 6 s on one core that is free
    assert average_iou(sizes, found) >= average_iou(sizes, fit(sizes[:20_000], 9, seed=0)) - 0.005
