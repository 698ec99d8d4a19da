import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from onestage.data.datamodule import DetectionData
from onestage.data.input_sizes import InputSizes
from onestage.data.loader import Loader
from onestage.types import Batch, Placement

DataOf = Callable[..., DetectionData]


def rank_of(loader: Loader, rank: int, world_size: int) -> Loader:
    loader.rank, loader.world_size = rank, world_size
    return loader


def in_steps_of(global_batch: int, data: DetectionData) -> DetectionData:
    data.global_batch = global_batch
    return data


def by_key(batches: list[Batch]) -> dict[str, tuple[torch.Tensor, Any]]:
    return {
        key: (image, target)
        for batch in batches
        for key, image, target in zip(batch.keys, batch.images, batch.targets, strict=True)
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_yields_just_what_the_order_says(
    data_of: DataOf, dataset: Path, num_workers: int, expected_steps: list[list[str]]
) -> None:
    loader = data_of(dataset, num_workers=num_workers).train_dataloader()
    steps = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(loader) == 5
        steps += [list(batch.keys) for batch in loader]
    assert steps == expected_steps[:10]


def test_batches_hold_their_images(data_of: DataOf, dataset: Path) -> None:
    loader = data_of(dataset, plain=True).train_dataloader()
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.keys), 3, 32, 48)
        assert batch.global_images == len(batch.keys)
        for key, image, target in zip(batch.keys, batch.images, batch.targets, strict=True):
            number = int(key)
            assert target.image_id == number
            assert image[:, 16, 24].tolist() == [8 * number] * 3
            assert target.labels.tolist() == [0, 1][: number % 3]
            assert target.difficult.tolist() == [False, True][: number % 3]
            assert target.crowd.tolist() == [False, False][: number % 3]
            assert target.placement == Placement()


def test_augmentation_is_the_same_on_any_rank_worker_and_batch(data_of: DataOf, dataset: Path) -> None:
    alone = by_key(list(data_of(dataset).train_dataloader()))
    for num_workers, batch_size, world_size in ((0, 3, 2), (2, 4, 1)):
        shared = by_key(
            [
                batch
                for rank in range(world_size)
                for batch in rank_of(
                    data_of(dataset, num_workers=num_workers, batch_size=batch_size).train_dataloader(),
                    rank,
                    world_size,
                )
            ]
        )
        assert shared.keys() == alone.keys()
        for key, (image, target) in alone.items():
            assert torch.equal(image, shared[key][0])
            assert torch.equal(target.boxes, shared[key][1].boxes)
    loader = data_of(dataset).train_dataloader()
    loader.set_epoch(1)
    other = by_key(list(loader))
    assert any(not torch.equal(alone[key][0], other[key][0]) for key in alone)


def test_loading_leaves_the_global_generator_alone(data_of: DataOf, dataset: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data_of(dataset).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_has_its_threads_back_after_each_batch(data_of: DataOf, dataset: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [torch.get_num_threads() for _ in data_of(dataset).train_dataloader()] == [3] * 5
    finally:
        torch.set_num_threads(before)


def test_empty_share(data_of: DataOf, dataset: Path) -> None:
    """19 images over 6 ranks of 3: one image is left for the second step, and five ranks have none."""
    last = []
    for rank in range(6):
        loader = rank_of(data_of(dataset, batch_size=3).train_dataloader(), rank, 6)
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert [batch.global_images for batch in batches] == [18, 1]
        last.append(batches[-1])
    assert [len(batch) for batch in last] == [1, 0, 0, 0, 0, 0]
    assert last[-1].images.shape == (0, 3, 32, 48)
    assert list(last[-1].targets) == list(last[-1].keys) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starts_in_the_middle_once(
    data_of: DataOf, dataset: Path, num_workers: int, expected_steps: list[list[str]]
) -> None:
    loader = data_of(dataset, num_workers=num_workers).train_dataloader()
    loader.start_at(12)
    assert len(loader) == 5
    expected = expected_steps[:5]
    assert [list(batch.keys) for batch in loader] == expected[3:]
    assert [list(batch.keys) for batch in loader] == expected


@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 1), (3, 1), (5, 1), (2, 3), (7, 2), (30, 1), (1, 4)])
def test_another_world_goes_on_at_the_very_next_image(
    data_of: DataOf, dataset: Path, expected_steps: list[list[str]], batch_size: int, world_size: int
) -> None:
    loader = data_of(dataset).train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"epoch": 0, "images": 8}
    left: Counter[str] = Counter()
    steps = set()
    for rank in range(world_size):
        other = rank_of(data_of(dataset, batch_size=batch_size).train_dataloader(), rank, world_size)
        other.load_state_dict(loader.state_dict())
        assert other.state_dict() == {"epoch": 0, "images": 8}
        read = list(other)
        steps.add(len(read))
        left += Counter(key for batch in read for key in batch.keys)
        assert other.state_dict() == {"epoch": 0, "images": 19}
    assert left == Counter(key for step in expected_steps[2:5] for key in step)
    global_batch = batch_size * world_size
    assert steps == {-(-19 // global_batch) - 8 // global_batch}


def steps_of(batches: Iterable[Batch]) -> list[list[str]]:
    """The keys of each step, put together from its micro-batches."""
    steps: list[list[str]] = [[]]
    for batch in batches:
        steps[-1] += batch.keys
        if batch.ends_step:
            steps.append([])
    assert steps.pop() == []
    return steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_global_batch_comes_in_micro_batches(
    data_of: DataOf, dataset: Path, num_workers: int, expected_steps: list[list[str]]
) -> None:
    loader = in_steps_of(4, data_of(dataset, num_workers=num_workers, batch_size=3)).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 10
    assert [len(batch) for batch in batches] == [2, 2] * 4 + [2, 1]
    assert [batch.global_images for batch in batches] == [4, 4] * 4 + [3, 3]
    assert [tuple(batch.part) for batch in batches] == [(0, 2), (1, 2)] * 5
    assert steps_of(batches) == expected_steps[:5]


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (1, 2), (2, 3), (1, 5), (3, 1)])
def test_micro_batches_of_a_step_share_their_size_on_all_ranks_and_their_images_are_the_same(
    data_of: DataOf, dataset: Path, batch_size: int, world_size: int
) -> None:
    """Of multi-scale training; one rank with whole steps says what each step has."""
    sizes = InputSizes(size=[32, 48], min=32, max=96, step=32, every=1)
    whole = list(data_of(dataset, input_sizes=sizes).train_dataloader())
    assert len({batch.images.shape[2:] for batch in whole}) > 1
    shared: dict[str, tuple[torch.Tensor, Any]] = {}
    for rank in range(world_size):
        data = in_steps_of(4, data_of(dataset, batch_size=batch_size, input_sizes=sizes))
        loader = rank_of(data.train_dataloader(), rank, world_size)
        batches = list(loader)
        parts = data.accumulate(world_size)
        assert [batch.images.shape[2:] for batch in batches] == [
            step.images.shape[2:] for step in whole for _ in range(parts)
        ]
        shared |= by_key(batches)
    for key, (image, target) in by_key(whole).items():
        assert torch.equal(image, shared[key][0])
        assert torch.equal(target.boxes, shared[key][1].boxes)


def test_a_step_counts_as_trained_with_its_last_micro_batch(data_of: DataOf, dataset: Path) -> None:
    loader = in_steps_of(4, data_of(dataset, batch_size=1)).train_dataloader()
    batches = iter(loader)
    reached = []
    for _ in range(9):
        next(batches)
        reached.append(loader.state_dict()["images"])
    assert reached == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    loader.in_flight = lambda: 1
    next(batches), next(batches), next(batches)
    assert loader.state_dict() == {"epoch": 0, "images": 8}


def test_workers_that_come_and_go_train_each_step_as_it_is(
    data_of: DataOf, dataset: Path, expected_steps: list[list[str]]
) -> None:
    """Three workers, then one, then two: two steps each, in two, four and two micro-batches; the last step is short."""
    state = {"epoch": 0, "images": 0}
    steps: list[set[str]] = []
    for world_size in (3, 1, 2):
        loaders = [
            rank_of(in_steps_of(4, data_of(dataset, batch_size=1)).train_dataloader(), rank, world_size)
            for rank in range(world_size)
        ]
        taken: list[set[str]] = [set(), set()]
        states = []
        for loader in loaders:
            loader.load_state_dict(state)
            parts = loader.steps.num_parts
            for keys, batch in zip([one for one in taken for _ in range(parts)], loader, strict=False):
                keys.update(batch.keys)
            states.append(loader.state_dict())
        state = states[0]
        assert states == [state] * world_size
        steps += [one for one in taken if one]
    assert steps == [set(step) for step in expected_steps[:5]]
    assert state == {"epoch": 0, "images": 19}


def test_a_step_begun_in_its_middle_does_not_start_before_it(data_of: DataOf, dataset: Path) -> None:
    """Images 0 to 7 are trained; in steps of 3 the third takes only image 8, and is cut short before it is trained."""
    loader = data_of(dataset, batch_size=3).train_dataloader()
    loader.load_state_dict({"epoch": 0, "images": 8})
    loader.in_flight = lambda: 1
    batches = iter(loader)
    assert len(next(batches)) == 1
    assert loader.state_dict() == {"epoch": 0, "images": 8}
    assert len(next(batches)) == 3
    assert loader.state_dict() == {"epoch": 0, "images": 9}
    loader.in_flight = lambda: 0
    assert loader.state_dict() == {"epoch": 0, "images": 12}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_is_skipped_and_its_images_named(
    data_of: DataOf, dataset: Path, tmp_path: Path, num_workers: int
) -> None:
    whole = list(data_of(dataset).train_dataloader())
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (root / "train-000002.tar").unlink()
    batches = list(data_of(root, num_workers=num_workers).train_dataloader())
    skipped = [one for batch in batches for one in batch.skipped]
    assert sorted(one.key for one in skipped) == ["000008", "000009", "000010", "000011"]
    assert all("train-000002.tar is missing" in one.why and "\n" not in one.why for one in skipped)
    for batch, before in zip(batches, whole, strict=True):  # the others are where they were, and as they were
        left = [place for place, key in enumerate(before.keys) if key in batch.keys]
        assert list(batch.keys) == [before.keys[place] for place in left]
        assert torch.equal(batch.images, before.images[left])
        assert batch.global_images == before.global_images


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_which_nothing_is_left_still_name_what_they_skip(
    data_of: DataOf, dataset: Path, tmp_path: Path, num_workers: int, split: str
) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    for shard in root.glob(f"{split}-*.tar"):
        shard.unlink()
    data = data_of(root, num_workers=num_workers)
    batches = list(data.train_dataloader() if split == "train" else data.val_dataloader())
    assert {len(batch) for batch in batches} == {0}
    first, count = {"train": (0, 19), "val": (19, 5)}[split]
    keys = sorted(one.key for batch in batches for one in batch.skipped)
    assert keys == [f"{number:06d}" for number in range(first, first + count)]


@pytest.fixture
def address(dataset: Path) -> Iterator[str]:
    """The dataset behind a real server on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(dataset))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_an_address_come_the_same_batches(
    data_of: DataOf, dataset: Path, address: str, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path))
    near = list(data_of(dataset).train_dataloader())
    far = list(data_of(address, num_workers=num_workers).train_dataloader())
    assert [list(batch.keys) for batch in far] == [list(batch.keys) for batch in near]
    assert all(torch.equal(a.images, b.images) for a, b in zip(near, far, strict=True))
    assert [len(batch.skipped) for batch in far] == [0] * 5
