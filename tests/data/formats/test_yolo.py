from pathlib import Path

import pytest
from PIL import Image

from onestage.data.formats import findings as kinds
from onestage.data.formats import yolo
from onestage.data.formats.record import Annotation, Labelled
from onestage.errors import InputError


def picture(path: Path, labels: str | None = None) -> None:
    """An image, and where they are given its labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(path)
    if labels is not None:
        folders = ["labels" if folder == "images" else folder for folder in path.parent.parts]
        at = Path(*folders) / f"{path.stem}.txt"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(labels)


def sources(labelled: Labelled) -> dict[str, list[str]]:
    return {split: [image.source for image in images] for split, images in labelled.splits.items()}


def boxes(labelled: Labelled) -> list[list[Annotation]]:
    return [image.annotations for images in labelled.splits.values() for image in images]


def found(labelled: Labelled) -> list[tuple[str, str, str]]:
    return [(finding.kind, finding.where, finding.what) for finding in labelled.findings]


def small(
    folder: Path, labels: str = "0 0.5 0.5 0.5 0.5\n", yaml: str = "train: images/train\nnames: [cat, dog]\n"
) -> Path:
    """A set of one image, whose data.yaml and labels are given."""
    picture(folder / "images" / "train" / "a.jpg", labels)
    (folder / "data.yaml").write_text(yaml)
    return folder


@pytest.mark.parametrize("names", ["[cat, no, 7]", "{0: cat, 1: no, 2: 7}", "{2: 7, 1: no, 0: cat}"])
def test_folders_and_names(tmp_path: Path, names: str) -> None:
    picture(tmp_path / "images" / "train" / "b.jpg", "1 0.5 0.5 0.25 0.5\n\n2 0.25 0.75 0.5 0.5")
    picture(tmp_path / "images" / "train" / "a.png")
    picture(tmp_path / "images" / "held" / "deep" / "c.jpg", "")
    (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/held/\ntest:\nnc: 3\nnames: {names}\n")
    labelled = yolo.read(tmp_path)
    assert labelled.classes == ("cat", "no", "7")  # a class called no is not False
    assert sources(labelled) == {
        "train": ["images/train/a.png", "images/train/b.jpg"],
        "val": ["images/held/deep/c.jpg"],
    }
    assert boxes(labelled) == [
        [],
        [Annotation("no", (0.375, 0.25, 0.625, 0.75)), Annotation("7", (0.0, 0.5, 0.5, 1.0))],
        [],
    ]
    assert all(image.relative and image.declared_size is None for image in labelled.splits["train"])
    assert labelled.findings == []
    assert labelled == yolo.read(tmp_path / "data.yaml", name=tmp_path.name)


def test_lists_of_folders_and_txt_files(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "one" / "a.jpg", "0 0.5 0.5 0.5 0.5")
    picture(tmp_path / "images" / "two" / "b.jpg", "0 0.5 0.5 0.5 0.5")
    picture(tmp_path / "images" / "c.jpg", "0 0.5 0.5 0.5 0.5")
    (tmp_path / "lists").mkdir()
    absolute = tmp_path / "images" / "two" / "b.jpg"
    (tmp_path / "lists" / "val.txt").write_text(f"./images/c.jpg\n\n{absolute}\nimages/gone.jpg\nimages/c.jpg\n")
    (tmp_path / "set.yaml").write_text("train:\n  - images/one\n  - images/two\nval: lists/val.txt\nnames: [cat]\n")
    labelled = yolo.read(tmp_path)
    assert sources(labelled) == {
        "train": ["images/one/a.jpg", "images/two/b.jpg"],
        "val": ["images/c.jpg", "images/two/b.jpg"],
    }
    assert found(labelled) == [
        (kinds.MISSING_IMAGE, "lists/val.txt:4", "images/gone.jpg"),
        (kinds.LISTED_TWICE, "images/c.jpg", "in val"),
    ]


@pytest.mark.parametrize("prefix", ["../", "..\\\\", "", "./"])
def test_roboflows_paths(tmp_path: Path, prefix: str) -> None:
    """They lead out of the folder that the yaml is in, to a split that may not be there."""
    for folder in ("train", "valid"):
        picture(tmp_path / "set" / folder / "images" / "a.jpg", "0 0.5 0.5 0.5 0.5")
    lines = [
        f'{key}: "{prefix}{folder}/images"' for key, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
    ]
    (tmp_path / "set" / "data.yaml").write_text("\n".join([*lines, "nc: 1", "names: ['cell']"]))
    labelled = yolo.read(tmp_path / "set")
    assert sources(labelled) == {"train": ["train/images/a.jpg"], "val": ["valid/images/a.jpg"]}
    assert [(kind, where) for kind, where, _ in found(labelled)] == [(kinds.MISSING_SPLIT, "data.yaml")]
    assert [len(one) for one in boxes(labelled)] == [1, 1]


@pytest.mark.parametrize("path", ["../here", "nowhere", ".", "{absolute}"])
def test_path_is_where_the_splits_are(tmp_path: Path, path: str) -> None:
    picture(tmp_path / "here" / "images" / "a.jpg", "0 0.5 0.5 0.5 0.5")
    yaml = tmp_path / ("here" if path in ("nowhere", ".") else "yamls") / "data.yaml"
    yaml.parent.mkdir(exist_ok=True)
    yaml.write_text(f"path: {path.format(absolute=tmp_path / 'here')}\ntrain: images\nnames: [cat]\n")
    assert [len(one) for one in boxes(yolo.read(yaml))] == [1]


def test_without_a_yaml(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "a.jpg", "1 0.5 0.5 0.5 0.5")
    picture(tmp_path / "images" / "valid" / "b.jpg", "0 0.5 0.5 0.5 0.5")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    labelled = yolo.read(tmp_path)
    assert labelled.classes == ("cat", "dog")
    assert sources(labelled) == {"train": ["images/train/a.jpg"], "val": ["images/valid/b.jpg"]}
    for split in ("train", "valid"):
        (tmp_path / "images" / split).rename(tmp_path / "images" / f"part-{split}")
        (tmp_path / "labels" / split).rename(tmp_path / "labels" / f"part-{split}")
    assert sources(yolo.read(tmp_path)) == {"train": ["images/part-train/a.jpg", "images/part-valid/b.jpg"]}


def test_labels_beside_the_image(tmp_path: Path) -> None:
    """Darknet's own way; and the last folder called images is the one that counts."""
    for place in ("plain/a.jpg", "images/x/images/b.jpg", "images/c.jpg"):
        picture(tmp_path / place)
    (tmp_path / "plain" / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "images" / "x" / "labels").mkdir()
    (tmp_path / "images" / "x" / "labels" / "b.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "images" / "c.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("train: [plain, images]\nnames: [cat]\n")
    assert [len(one) for one in boxes(yolo.read(tmp_path))] == [1, 1, 1]


def test_polygons_are_their_boxes_which_is_said_once(tmp_path: Path) -> None:
    small(tmp_path, "0 0.1 0.2 0.5 0.1 0.3 0.9\n1 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.4 0.1 0.4 0.3 0.1 0.3\n")
    picture(tmp_path / "images" / "train" / "b.jpg", "0 0.1 0.2 0.5 0.1 0.3 0.9\n")
    labelled = yolo.read(tmp_path)
    assert boxes(labelled)[0] == [
        Annotation("cat", (0.1, 0.1, 0.5, 0.9)),
        Annotation("dog", (0.25, 0.25, 0.75, 0.75)),
        Annotation("dog", (0.1, 0.1, 0.4, 0.3)),
    ]
    assert found(labelled) == [(kinds.POLYGONS, "data.yaml", "3 in 2 files")]


def test_keypoints_are_left_behind(tmp_path: Path) -> None:
    yaml = "train: images/train\nnames: [cat, dog]\nkpt_shape: [2, 3]\n"
    small(tmp_path, "1 0.5 0.5 0.5 0.5 0.9 0.9 2 0.1 0.1 2", yaml)
    labelled = yolo.read(tmp_path)
    assert boxes(labelled) == [[Annotation("dog", (0.25, 0.25, 0.75, 0.75))]]
    assert labelled.findings == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("2 0.5 0.5 0.5 0.5", kinds.UNKNOWN_CLASS),
        ("-1 0.5 0.5 0.5 0.5", kinds.UNKNOWN_CLASS),
        ("0 0.5 0.5 0.5", kinds.UNREADABLE_ANNOTATION),
        ("0 0.5 0.5 0.5 0.5 0.99", kinds.UNREADABLE_ANNOTATION),
        ("0.5 0.5 0.5 0.5 0.5", kinds.UNREADABLE_ANNOTATION),
        ("cat 0.5 0.5 0.5 0.5", kinds.UNREADABLE_ANNOTATION),
        ("0 0.5 nan 0.5 0.5", kinds.UNREADABLE_ANNOTATION),
        ("inf 0.5 0.5 0.5 0.5", kinds.UNREADABLE_ANNOTATION),
        ("0", kinds.UNREADABLE_ANNOTATION),
    ],
)
def test_a_line_that_is_no_label_is_left_out(tmp_path: Path, line: str, kind: str) -> None:
    labelled = yolo.read(small(tmp_path, f"1 0.5 0.5 1 1\n{line}\n0.0 0.5 0.5 1 1"))
    assert boxes(labelled) == [[Annotation("dog", (0, 0, 1, 1)), Annotation("cat", (0, 0, 1, 1))]]
    assert [(one, where) for one, where, _ in found(labelled)] == [(kind, "labels/train/a.txt:2")]


def test_an_image_whose_labels_are_no_text_is_left_out(tmp_path: Path) -> None:
    small(tmp_path)
    picture(tmp_path / "images" / "train" / "b.jpg")
    (tmp_path / "labels" / "train" / "b.txt").write_bytes(b"\xff\xfe0 0.5")
    labelled = yolo.read(tmp_path)
    assert sources(labelled) == {"train": ["images/train/a.jpg"]}
    assert [(kind, where) for kind, where, _ in found(labelled)] == [
        (kinds.UNREADABLE_ANNOTATION, "labels/train/b.txt")
    ]


def test_labels_without_their_image_are_told(tmp_path: Path) -> None:
    small(tmp_path)
    picture(tmp_path / "images" / "train" / "b.webp", "0 0.5 0.5 0.5 0.5")  # there, if of another kind
    for name in ("gone.txt", "classes.txt"):
        (tmp_path / "labels" / "train" / name).write_text("0 0.5 0.5 0.5 0.5\n")
    labelled = yolo.read(tmp_path)
    assert sources(labelled) == {"train": ["images/train/a.jpg", "images/train/b.webp"]}
    assert found(labelled) == [(kinds.MISSING_IMAGE, "labels/train/gone.txt", "gone.jpg or .png")]


@pytest.mark.parametrize("where", ["classes.txt", "train.txt"])
def test_a_list_that_is_no_text(tmp_path: Path, where: str) -> None:
    small(tmp_path, yaml="train: train.txt\nnames: [cat]\n")
    (tmp_path / where).write_bytes("café\n".encode("latin-1"))
    if where == "classes.txt":
        (tmp_path / "data.yaml").unlink()
    with pytest.raises(InputError, match=f"{where} is no list that can be read"):
        yolo.read(tmp_path)


def test_paths_that_no_file_can_have_lead_nowhere(tmp_path: Path) -> None:
    small(tmp_path, yaml=f"path: {'x' * 5000}\ntrain: images/train\nval: {'y' * 5000}\nnames: [cat]\n")
    labelled = yolo.read(tmp_path)
    assert sources(labelled) == {"train": ["images/train/a.jpg"]}
    assert [kind for kind, *_ in found(labelled)] == [kinds.MISSING_SPLIT]
    (tmp_path / "data.yaml").write_text("train: images/nowhere\nnames: [cat]\n")
    with pytest.raises(
        InputError, match=r"leads to no image \(split without images: train: there is no images/nowhere"
    ):
        yolo.read(tmp_path)


def test_given_classes(tmp_path: Path) -> None:
    assert yolo.read(small(tmp_path), classes=["dog"]).classes == ("dog",)
    with pytest.raises(InputError, match="has no class owl: choose from cat, dog"):
        yolo.read(tmp_path, classes=["owl"])


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train: images/train\n", "has no names"),
        ("train: images/train\nnames: []", "has no names"),
        ("train: images/train\nnames: cat", "has no names"),
        ("train: images/train\nnames: [cat, [dog]]", "has no names"),
        ("train: images/train\nnames: [cat, cat]", "needs names that differ"),
        ("train: images/train\nnames: {0: cat, 2: dog}", r"numbers its names \[0, 2\]"),
        ("train: images/train\nnames: {a: cat}", "numbers of classes that are none"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3", "says nc: 3 but has 2 names"),
        ("train: images/train\nnames: [cat]\nkpt_shape: 17", "kpt_shape that is no list"),
        ("train: images/train\nnames: [cat]\nkpt_shape: [x]", "kpt_shape that is no list"),
        ("names: [cat]", "has no train, val or test"),
        ("train: {a: b}\nnames: [cat]", "has a train that is no path"),
        ("train: images/nowhere\nnames: [cat]", "leads to no image"),
        ("- train", "is no data.yaml"),
        ("train: [", "is no yaml that can be read"),
        ("train: !!python/object/apply:os.getcwd []\nnames: [cat]", "has no train, val or test"),
    ],
)
def test_a_data_yaml_that_makes_everything_doubtful(tmp_path: Path, yaml: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        yolo.read(small(tmp_path, yaml=yaml))
    assert "\n" not in str(refused.value)


def test_images_without_any_labels_are_no_set(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(InputError, match=r"no image of .* has a txt: .*a.jpg needs .*labels/train/a.txt"):
        yolo.read(tmp_path)


def test_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no YOLO dataset"):
        yolo.read(tmp_path)
    with pytest.raises(InputError, match="is no YOLO dataset"):
        yolo.read(tmp_path / "nowhere.yaml")
