from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from onestage.data import order
from onestage.data.manifest import Manifest, Shard, Split

WORLDS = st.integers(1, 7)
BATCH_SIZES = st.integers(1, 9)
GLOBAL_BATCHES = st.none() | st.integers(1, 40)
SHARD_SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=20)


def manifest_of(sizes: list[int]) -> Manifest:
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    shards = [
        Shard(f"{index}.tar", size, 0, "", first) for index, (size, first) in enumerate(zip(sizes, firsts, strict=True))
    ]
    return Manifest(name="numbers", classes=("one",), splits={"train": Split(tuple(shards))})


def all_ranks(sizes: list[int], world_size: int, *, seed: int = 0, epoch: int = 0) -> list[list[str]]:
    manifest = manifest_of(sizes)
    return [
        order.shuffled(manifest, "train", seed=seed, epoch=epoch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@given(SHARD_SIZES, WORLDS, st.integers(0, 2**40), st.integers(0, 1000))
def test_every_image_once(sizes: list[int], world_size: int, seed: int, epoch: int) -> None:
    ranks = all_ranks(sizes, world_size, seed=seed, epoch=epoch)
    assert Counter(key for keys in ranks for key in keys) == Counter(f"{n:06d}" for n in range(sum(sizes)))


@given(SHARD_SIZES, WORLDS, BATCH_SIZES, GLOBAL_BATCHES)
def test_the_ranks_micro_batches_make_up_the_steps_slices_of_the_order(
    sizes: list[int], world: int, batch: int, global_batch: int | None
) -> None:
    num, images = sum(sizes), global_batch or batch * world
    (alone,) = all_ranks(sizes, 1)
    steps = order.Steps(num, batch, world, global_batch)
    ranks = [steps.shares(keys, rank=rank) for rank, keys in enumerate(all_ranks(sizes, world))]
    assert {len(shares) for shares in ranks} == {len(steps) * steps.num_parts}
    for step in range(len(steps)):
        expected = alone[step * images : (step + 1) * images]
        parts = [[share for share in shares if share.step == step] for shares in ranks]
        assert Counter(expected) == Counter(key for mine in parts for share in mine for key in share.keys)
        assert {share.global_images for mine in parts for share in mine} == {len(expected)}
        assert {tuple(share.part for share in mine) for mine in parts} == {
            tuple((number, steps.num_parts) for number in range(steps.num_parts))
        }
        lengths = [[len(share.keys) for share in mine] for mine in parts]
        assert all(max(mine) - min(mine) <= 1 and max(mine) <= batch for mine in lengths)
        of_ranks = [sum(mine) for mine in lengths]
        assert max(of_ranks) - min(of_ranks) <= 1
        # A part beyond the largest share is empty on every rank, any other on none but those with a smaller share.
        largest = -(-len(expected) // world)
        for number in range(steps.num_parts):
            assert (max(mine[number] for mine in lengths) > 0) == (number < largest)


@given(SHARD_SIZES, st.integers(1, 30), st.lists(st.tuples(WORLDS, BATCH_SIZES, st.integers(0, 5)), max_size=6))
def test_workers_that_come_and_go_change_no_step(
    sizes: list[int], global_batch: int, phases: list[tuple[int, int, int]]
) -> None:
    """Each phase trains some steps with workers of its own number, and the last one what is left of the epoch."""
    num = sum(sizes)
    (alone,) = all_ranks(sizes, 1)
    trained: list[Counter[str]] = []
    for world, batch, num_steps in [*phases, (1, 1, num)]:
        steps = order.Steps(num, batch, world, global_batch)
        contents: dict[int, Counter[str]] = {}
        start = len(trained) * global_batch
        if start >= num:
            break
        for rank, keys in enumerate(all_ranks(sizes, world)):
            for share in steps.shares(keys, rank=rank, start=start):
                contents.setdefault(share.step, Counter()).update(share.keys)
        assert list(contents) == list(range(len(trained), len(steps)))
        trained += list(contents.values())[:num_steps]
    assert trained == [Counter(alone[first : first + global_batch]) for first in range(0, num, global_batch)]


@given(SHARD_SIZES, WORLDS, BATCH_SIZES, GLOBAL_BATCHES, st.data())
def test_a_start_in_the_middle_leaves_out_just_the_images_before_it(
    sizes: list[int], world: int, batch: int, global_batch: int | None, data: st.DataObject
) -> None:
    """Where steps of another size have stopped: no image twice, none lost, from the second step on the usual ones."""
    num = sum(sizes)
    start = data.draw(st.integers(0, num - 1))
    (alone,) = all_ranks(sizes, 1)
    steps = order.Steps(num, batch, world, global_batch)
    ranks = list(enumerate(all_ranks(sizes, world)))
    rest = [steps.shares(keys, rank=rank, start=start) for rank, keys in ranks]
    usual = [steps.shares(keys, rank=rank) for rank, keys in ranks]
    assert Counter(key for shares in rest for share in shares for key in share.keys) == Counter(alone[start:])
    first = start // steps.images
    for shares, whole in zip(rest, usual, strict=True):
        assert [share for share in shares if share.step > first] == [share for share in whole if share.step > first]
        assert len(shares) == len(whole) - first * steps.num_parts
        assert sum(share.global_images for share in shares if share.part.number == 0) == num - start
    lengths = [sum(len(share.keys) for share in shares if share.step == first) for shares in rest]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 500), WORLDS, BATCH_SIZES, GLOBAL_BATCHES)
def test_steps_hold_every_image_and_no_step_is_empty(
    num: int, world: int, batch: int, global_batch: int | None
) -> None:
    steps = order.Steps(num, batch, world, global_batch)
    assert (len(steps) - 1) * steps.images < num <= len(steps) * steps.images


def test_micro_batches_fill_up_what_workers_are_missing() -> None:
    """64 images in batches of 8: the largest share is 8, 13, 22 or 64."""
    parts = [order.num_micro_batches(64, batch_size=8, world_size=world) for world in (8, 5, 3, 1, 100)]
    assert parts == [1, 2, 3, 8, 1]


def test_a_share_is_cut_as_evenly_as_it_goes() -> None:
    """Five images over two ranks, two at once: one rank has 3, 2 and 1, the other 2, 1 and 1."""
    steps = order.Steps(num_samples=5, batch_size=2, world_size=2, global_batch=5)
    assert [share.keys for share in steps.shares(["0", "2", "4"], rank=0)] == [["0", "2"], ["4"]]
    assert [share.keys for share in steps.shares(["1", "3"], rank=1)] == [["1"], ["3"]]


def test_epoch_and_seed_change_the_order() -> None:
    orders = [tuple(all_ranks([10] * 10, 1, seed=s, epoch=e)[0]) for s in range(2) for e in range(2)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(all_ranks([10] * 10, 1)[0])


def test_images_mix_within_a_window_of_shards_only() -> None:
    (keys,) = all_ranks([5] * 20, 1)
    shards_of_first_window = {int(key) // 5 for key in keys[: 5 * order.WINDOW_SHARDS]}
    assert len(shards_of_first_window) == order.WINDOW_SHARDS
    assert len({int(key) // 5 for key in keys[:5]}) > 1


def test_in_order_is_as_stored() -> None:
    manifest = manifest_of([3, 2])
    assert order.in_order(manifest, "train", rank=0, world_size=1) == [f"00000{n}" for n in range(5)]
    assert order.in_order(manifest, "train", rank=1, world_size=2) == ["000001", "000003"]


def test_keys_of_a_folder(dataset: Path) -> None:
    whole = order.keys(dataset, "train", seed=3, epoch=1, rank=0, world_size=1)
    assert sorted(whole) == [f"{n:06d}" for n in range(19)]
    halves = [order.keys(dataset, "train", seed=3, epoch=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert [key for pair in zip(*halves, strict=False) for key in pair] == whole[:18]
