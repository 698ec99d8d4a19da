"""Splits by content: the shares of every class, the same again under other names, and copies together."""

import random
from collections import Counter
from pathlib import Path

import pytest

from onestage.data.formats.record import Record, Source
from onestage.data.splitting import split
from onestage.errors import InputError

CLASSES = ("common", "rare", "very rare")


def record(path: Path, labels: list[int]) -> Record:
    return Record(
        path=path,
        width=10,
        height=10,
        boxes=[(0.0, 0.0, 5.0, 5.0)] * len(labels),
        labels=labels,
        difficult=[False] * len(labels),
        crowd=[False] * len(labels),
        source=path.name,
    )


def labels_of(number: int) -> list[int]:
    """800 of 1,000 images have the first class, 100 the second (half of them with the first), 20 the third."""
    labels = [0] * (number % 3 + 1) if number < 800 else []
    if 750 <= number < 850:
        labels = [*labels, 1, 1]
    if 845 <= number < 865:
        labels = [*labels, 2]
    return labels


def make(folder: Path, numbers: list[int], *, name: str = "image{}.jpg") -> Source:
    """A set in the order of ``numbers``; image n holds the text n."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in numbers:
        path = folder / name.format(number)
        path.write_text(str(number))
        records.append(record(path, labels_of(number)))
    return Source(name="set", classes=CLASSES, splits={"train": records}, findings=[])


def numbers(source: Source) -> dict[str, set[int]]:
    return {name: {int(one.path.read_text()) for one in records} for name, records in source.splits.items()}


def test_every_class_has_its_share_in_every_split(tmp_path: Path) -> None:
    source = split(make(tmp_path, list(range(1000))), val=0.2, test=0.1)
    sizes = {name: len(records) for name, records in source.splits.items()}
    assert list(sizes) == ["train", "val", "test"]
    assert sum(sizes.values()) == 1000
    assert all(abs(sizes[name] - size) <= 2 for name, size in {"train": 700, "val": 200, "test": 100}.items())
    with_class = {
        name: Counter(label for one in records for label in set(one.labels) or {None})
        for name, records in source.splits.items()
    }
    # By hand: 800, 100 and 20 images have the classes, and 135 have none.
    for label, total in {0: 800, 1: 100, 2: 20, None: 135}.items():
        assert sum(counts[label] for counts in with_class.values()) == total
        for name, share in {"train": 0.7, "val": 0.2, "test": 0.1}.items():
            assert abs(with_class[name][label] - share * total) <= 2, (name, label)


def test_the_same_content_is_split_the_same(tmp_path: Path) -> None:
    order = list(range(200)) + list(range(780, 900))
    first = numbers(split(make(tmp_path / "one", order), val=0.2, test=0.1, seed=4))
    random.Random(1).shuffle(order)
    renamed = make(tmp_path / "other" / "folder", order, name="{0:x}-again.png")
    assert numbers(split(renamed, val=0.2, test=0.1, seed=4)) == first
    assert numbers(split(renamed, val=0.2, test=0.1, seed=5)) != first


def test_within_a_split_the_order_stays(tmp_path: Path) -> None:
    source = split(make(tmp_path, list(range(100))), val=0.3)
    assert list(source.splits) == ["train", "val"]
    for records in source.splits.values():
        positions = [int(one.path.read_text()) for one in records]
        assert positions == sorted(positions)


def test_copies_stay_together(tmp_path: Path) -> None:
    source = make(tmp_path, list(range(60)))
    copies = make(tmp_path / "copies", [number // 2 for number in range(120)], name="{}.jpg").splits["train"]
    every = Source("set", CLASSES, {"train": source.splits["train"] + copies}, [])
    dealt = split(every, val=0.25, test=0.25)
    by_split = list(numbers(dealt).values())
    assert all(by_split)
    assert not by_split[0] & by_split[1] and not by_split[0] & by_split[2] and not by_split[1] & by_split[2]
    assert sum(len(records) for records in dealt.splits.values()) == 180
    assert all(abs(len(dealt.splits[name]) - 45) <= 6 for name in ("val", "test"))


def test_progress_ends_with_all(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    split(make(tmp_path, list(range(40))), val=0.2, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)


@pytest.mark.parametrize(
    ("val", "test"), [(-0.1, 0.2), (1.0, 0.0), (0.5, 0.5), (0.7, 0.4), (0.0, 0.0), (float("nan"), 0.1)]
)
def test_shares_that_leave_no_train(tmp_path: Path, val: float, test: float) -> None:
    with pytest.raises(InputError, match=f"val {val:g} and test {test:g} leave no train"):
        split(make(tmp_path, [1, 2, 3]), val=val, test=test)


def test_a_set_with_splits_keeps_them(tmp_path: Path) -> None:
    records = make(tmp_path, [1, 2, 3]).splits["train"]
    source = Source("pets", CLASSES, {"train": records[:2], "val": records[2:]}, [])
    with pytest.raises(InputError, match=r"pets has splits already \(train, val\)"):
        split(source, val=0.2)


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 different images are too few for a val and a test of set"):
        split(make(tmp_path, [1, 2]), val=0.1, test=0.1)
