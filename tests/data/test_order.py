from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from onestage.data import order
from onestage.data.manifest import Manifest, Shard, Split

WORLDS = st.integers(1, 7)
BATCH_SIZES = st.integers(1, 9)
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


@given(SHARD_SIZES, WORLDS, BATCH_SIZES)
def test_the_ranks_shares_make_up_the_batches_of_a_single_rank(sizes: list[int], world: int, batch: int) -> None:
    num = sum(sizes)
    (alone,) = all_ranks(sizes, 1)
    single = order.shares(alone, num_samples=num, batch_size=batch * world, rank=0, world_size=1)
    shared = [
        order.shares(keys, num_samples=num, batch_size=batch, rank=rank, world_size=world)
        for rank, keys in enumerate(all_ranks(sizes, world))
    ]
    assert all(list(steps) == list(range(len(single))) for steps in shared)
    for step, whole in single.items():
        parts = [steps[step] for steps in shared]
        assert Counter(whole.keys) == Counter(key for part in parts for key in part.keys)
        assert {part.global_images for part in parts} == {len(whole.keys)}
        lengths = [len(part.keys) for part in parts]
        assert max(lengths) - min(lengths) <= (1 if step == len(single) - 1 else 0)


@given(SHARD_SIZES, WORLDS, BATCH_SIZES, st.data())
def test_a_start_in_the_middle_leaves_out_just_the_images_before_it(
    sizes: list[int], world: int, batch: int, data: st.DataObject
) -> None:
    """Wherever another world has stopped: no image twice, none lost, and from the second step on the usual ones."""
    num = sum(sizes)
    start = data.draw(st.integers(0, num - 1))
    (alone,) = all_ranks(sizes, 1)
    ranks = list(enumerate(all_ranks(sizes, world)))
    settings = {"num_samples": num, "batch_size": batch, "world_size": world}
    rest = [order.shares(keys, rank=rank, start=start, **settings) for rank, keys in ranks]
    usual = [order.shares(keys, rank=rank, **settings) for rank, keys in ranks]
    assert Counter(key for steps in rest for share in steps.values() for key in share.keys) == Counter(alone[start:])
    for steps, whole in zip(rest, usual, strict=True):
        first = start // (batch * world)
        assert list(steps) == list(whole)[first:]
        assert all(steps[step] == whole[step] for step in list(steps)[1:])
        assert sum(share.global_images for share in steps.values()) == num - start
    lengths = [len(next(iter(steps.values())).keys) for steps in rest]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 500), WORLDS, BATCH_SIZES)
def test_steps_hold_every_image_and_no_step_is_empty(num: int, world: int, batch: int) -> None:
    steps = order.num_steps(num, batch_size=batch, world_size=world)
    assert (steps - 1) * batch * world < num <= steps * batch * world


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
