import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onestage.data.formats import coco
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Annotation, Labelled
from onestage.errors import InputError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 80)).save(path)


def image(number: int, file_name: str, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": file_name, "width": 100, "height": 80, **fields}


def drawn(image_id: int, category: int, bbox: list[float], **fields: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": image_id, "category_id": category, "bbox": bbox, "iscrowd": 0, "area": 12.5, **fields}


def write(path: Path, images: Any, annotations: Any, categories: Any = CATEGORIES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def sources(labelled: Labelled) -> dict[str, list[str]]:
    return {split: [image.source for image in images] for split, images in labelled.splits.items()}


def found(labelled: Labelled) -> list[tuple[str, str]]:
    return [(finding.kind, finding.what) for finding in labelled.findings]


def test_the_standard_layout(tmp_path: Path) -> None:
    """Ids that are not contiguous, a crowd, an image without annotations, one without a category of its own."""
    picture(tmp_path / "train2017" / "a.jpg")
    picture(tmp_path / "train2017" / "b.jpg")
    picture(tmp_path / "val2017" / "a.jpg")
    annotations = [
        drawn(500, 18, [10, 20, 30, 40]),
        drawn(500, 90, [0.5, 1, 2.25, 3], iscrowd=1, segmentation={"size": [80, 100], "counts": [1, 2]}),
        drawn(500, 1, [1, 1, 2, 2], difficult=1, segmentation=[[50, 50, 60, 60, 50, 60]]),
    ]
    write(tmp_path / "annotations" / "instances_val2017.json", [image(3, "a.jpg")], [])
    write(
        tmp_path / "annotations" / "instances_train2017.json",
        [image(500, "a.jpg"), image(2, "b.jpg", width=0)],
        annotations,
    )
    (tmp_path / "annotations" / "captions_train2017.json").write_text("not even json")
    labelled = coco.read(tmp_path)
    assert labelled.classes == ("person", "dog", "toothbrush")
    assert labelled.findings == []
    assert sources(labelled) == {"train": ["train2017/a.jpg", "train2017/b.jpg"], "val": ["val2017/a.jpg"]}
    first, second = labelled.splits["train"]
    assert first.annotations == [
        Annotation("dog", (10, 20, 40, 60)),
        Annotation("toothbrush", (0.5, 1, 2.75, 4), crowd=True),
        Annotation("person", (1, 1, 3, 3), difficult=True),
    ]
    assert (first.declared_size, second.declared_size) == ((100, 80), None)
    assert (second.annotations, first.relative) == ([], False)


def test_roboflows_layout_and_its_grouping_category(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "red", "supercategory": "cells"},
        {"id": 2, "name": "white", "supercategory": "cells"},
    ]
    for folder in ("train", "valid", "test"):
        picture(tmp_path / folder / "a.jpg")
        write(
            tmp_path / folder / "_annotations.coco.json", [image(0, "a.jpg")], [drawn(0, 2, [1, 1, 5, 5])], categories
        )
    labelled = coco.read(tmp_path)
    assert sources(labelled) == {"train": ["train/a.jpg"], "val": ["valid/a.jpg"], "test": ["test/a.jpg"]}
    assert labelled.classes == ("red", "white")
    assert found(labelled) == [(kinds.GROUPING_CLASS, "cells")]
    assert list(coco.read(tmp_path / "valid").splits) == ["train"]

    write(tmp_path / "test" / "_annotations.coco.json", [image(0, "a.jpg")], [drawn(0, 0, [1, 1, 5, 5])], categories)
    labelled = coco.read(tmp_path)
    assert (labelled.classes, labelled.findings) == (("cells", "red", "white"), [])


@pytest.mark.parametrize("place", ["images/a.jpg", "a.jpg"])
@pytest.mark.parametrize("given", ["result.json", ""])
def test_a_json_with_its_images(tmp_path: Path, place: str, given: str) -> None:
    picture(tmp_path / place)
    write(tmp_path / "result.json", [image(1, "a.jpg")], [])
    (tmp_path / "notes.json").write_text('["of another kind"]')
    assert sources(coco.read(tmp_path / given, name="mine")) == {"train": [place]}
    assert coco.read(tmp_path / given).name == tmp_path.name


def test_an_images_own_split_comes_first(tmp_path: Path) -> None:
    for place in ("images/train/a.jpg", "images/val/a.jpg", "images/a.jpg"):
        picture(tmp_path / place)
    write(tmp_path / "annotations" / "train.json", [image(1, "a.jpg")], [])
    write(tmp_path / "annotations" / "val.json", [image(1, "a.jpg")], [])
    assert sources(coco.read(tmp_path)) == {"train": ["images/train/a.jpg"], "val": ["images/val/a.jpg"]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_val2017", "val"),
        ("instances_default", "train"),
        ("valid", "val"),
        ("my-test_v2", "test"),
        ("instances_minitrain", "minitrain"),
    ],
)
def test_a_files_name_tells_its_split(tmp_path: Path, name: str, split: str) -> None:
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / "annotations" / f"{name}.json", [image(1, "a.jpg")], [])
    assert list(coco.read(tmp_path).splits) == [split]


def test_faults_of_one_image_or_box_are_findings(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.jpg")
    picture(tmp_path / "elsewhere.jpg")
    images = [
        image(1, "a.jpg"),
        image(2, "../elsewhere.jpg"),
        image(3, str(tmp_path / "elsewhere.jpg")),
        image(4, r"..\elsewhere.jpg"),
        image(5, "gone.jpg"),
        image(6, "a.jpg"),
        image(7, "x" * 5000),
    ]
    annotations = [
        drawn(1, 18, [1, 2, 3, 4]),
        drawn(6, 1, [5, 6, 7, 8]),
        drawn(1, 2, [1, 2, 3, 4]),
        drawn(99, 1, [1, 2, 3, 4]),
        drawn(1, 1, [1, 2, 3]),
        drawn(1, 1, [1, 2, 3, float("nan")]),
        {"image_id": 1, "category_id": 1},
        {"image_id": [], "category_id": 1, "bbox": [1, 2, 3, 4]},
        "nonsense",
        drawn(1, 90, [], segmentation=[[10, 20, 30, 20, 30, 45], [12, 8, 14, 30, 20, 30]]),
    ]
    write(tmp_path / "a.json", images, annotations)
    labelled = coco.read(tmp_path / "a.json")
    assert [image.source for image in labelled.splits["train"]] == ["images/a.jpg"]
    assert labelled.splits["train"][0].annotations == [
        Annotation("dog", (1, 2, 4, 6)),
        Annotation("toothbrush", (10, 8, 30, 45)),
        Annotation("person", (5, 6, 12, 14)),
    ]
    assert [kind for kind, _ in found(labelled)] == [
        kinds.UNKNOWN_CLASS,
        kinds.MISSING_IMAGE,
        *[kinds.UNREADABLE_ANNOTATION] * 5,
        *[kinds.ELSEWHERE] * 3,
        kinds.MISSING_IMAGE,
        kinds.LISTED_TWICE,
        kinds.MISSING_IMAGE,
    ]


def test_numbers_and_marks_as_other_tools_write_them(tmp_path: Path) -> None:
    """A mark as text, or null; a number that no float holds, and an outline that does not end."""
    picture(tmp_path / "a.jpg")
    annotations = [
        drawn(1, 18, [1, 2, 3, 4], iscrowd="0"),
        drawn(1, 18, [5, 2, 3, 4], iscrowd=None),
        drawn(1, 18, [9, 2, 3, 4], iscrowd="1"),
        drawn(1, 18, [10**400, 2, 3, 4]),
        drawn(1, 18, [], segmentation=[[1, 2, float("inf"), 2, 3, 4]]),
    ]
    write(tmp_path / "a.json", [image(1, "a.jpg")], annotations)
    labelled = coco.read(tmp_path)
    assert [one.crowd for one in labelled.splits["train"][0].annotations] == [False, False, True]
    assert found(labelled) == [
        (kinds.UNREADABLE_ANNOTATION, "int too large to convert to float"),
        (kinds.UNREADABLE_ANNOTATION, "its box is not finite: (1.0, 2.0, inf, 4.0)"),
    ]


def test_one_json_of_the_standard_layout(tmp_path: Path) -> None:
    """Its images are not beside it, but beside its folder."""
    picture(tmp_path / "val2017" / "a.jpg")
    write(tmp_path / "annotations" / "instances_val2017.json", [image(1, "a.jpg")], [])
    labelled = coco.read(tmp_path / "annotations" / "instances_val2017.json")
    assert (labelled.name, sources(labelled), labelled.findings) == (tmp_path.name, {"val": ["val2017/a.jpg"]}, [])


def test_roboflows_group_may_have_a_classes_name(tmp_path: Path) -> None:
    """As in its raccoon set: two categories are called so, and one of them is none."""
    picture(tmp_path / "train" / "a.jpg")
    group = {"id": 0, "name": "raccoon", "supercategory": "none"}
    write(
        tmp_path / "train" / "_annotations.coco.json",
        [image(1, "a.jpg")],
        [drawn(1, 1, [1, 2, 3, 4])],
        [group, {"id": 1, "name": "raccoon", "supercategory": "raccoon"}],
    )
    labelled = coco.read(tmp_path)
    assert labelled.classes == ("raccoon",)
    assert [one.name for one in labelled.splits["train"][0].annotations] == ["raccoon"]
    assert found(labelled) == [(kinds.GROUPING_CLASS, "raccoon")]


def test_given_classes(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.json", [image(1, "a.jpg")], [])
    assert coco.read(tmp_path, classes=["toothbrush", "dog"]).classes == ("toothbrush", "dog")
    with pytest.raises(InputError, match="has no class doge: choose from person, dog, toothbrush"):
        coco.read(tmp_path, classes=["person", "doge"])


ONE = {"id": 1, "name": "a"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no json that can be read"),
        ("[1, 2]", "it is no COCO file"),
        ({"images": [], "annotations": []}, "it is no COCO file"),
        ({"categories": []}, "has no categories"),
        ({"categories": [{"id": 1}]}, "category without id and name"),
        ({"categories": [3]}, "category without id and name"),
        ({"categories": [ONE, {"id": "2", "name": "b"}]}, "category without id and name, or with an odd one"),
        ({"categories": [ONE, {"id": 2, "name": "a "}]}, "two categories of one name"),
        ({"categories": [ONE, {"id": 1, "name": "b"}]}, "two categories of one id"),
        ({"images": [{"id": 1}], "categories": [ONE]}, "an image without id or file_name"),
        ({"images": [image(1, "a"), image(1, "b")], "categories": [ONE]}, "two images with the id 1"),
    ],
)
def test_a_file_that_makes_everything_doubtful(tmp_path: Path, content: Any, said: str) -> None:
    if isinstance(content, dict):
        rest = {} if "annotations" in content else {"images": [], "annotations": []}
        content = json.dumps({**rest, **content})
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        coco.read(tmp_path / "set.json")
    assert "set.json" in str(refused.value)


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "train.json", [], [])
    write(tmp_path / "annotations" / "val.json", [], [], CATEGORIES[:2])
    with pytest.raises(InputError, match=r"val.json and .*train.json have different categories"):
        coco.read(tmp_path)
    write(tmp_path / "annotations" / "val.json", [], [])
    write(tmp_path / "annotations" / "train2.json", [], [])
    with pytest.raises(InputError, match=r"train.json and .*train2.json are both the split 'train'"):
        coco.read(tmp_path)


def test_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no COCO dataset"):
        coco.read(tmp_path)
    with pytest.raises(InputError, match="is no COCO dataset"):
        coco.read(tmp_path / "nowhere")
