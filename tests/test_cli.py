"""The command line: quick help, and the road from labelled images to annotated pictures."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestage.cli import main

HEAVY = ("torch", "torchvision", "ray", "mlflow", "pytorch_lightning", "hydra", "omegaconf", "cv2", "numpy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["quickstart", "--help"],
        ["data", "--help"],
        ["data", "import", "--help"],
        ["data", "export", "--help"],
        ["data", "check", "--help"],
        ["data", "inspect", "--help"],
        ["anchors", "--help"],
        ["evaluate", "--help"],
        ["compare", "--help"],
        ["models", "--help"],
        ["models", "promote", "--help"],
        ["server", "--help"],
        ["dashboard", "--help"],
        ["predict", "--help"],
        ["export", "--help"],
        ["replay", "--help"],
        ["bench", "detectors", "--help"],
        ["bench", "data", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom onestage.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usage: onestage")
    assert ran.stdout.splitlines()[-1] == "[]"


def test_jobs_train_is_onestage_train() -> None:
    job = Path(__file__).parents[1] / "jobs" / "train.py"
    same = [
        subprocess.run([*command, "trainer.max_epoch=1"], capture_output=True, text=True, timeout=120)
        for command in ([sys.executable, str(job)], [sys.executable, "-m", "onestage.cli", "train"])
    ]
    assert [one.returncode for one in same] == [2, 2]
    assert same[0].stderr == same[1].stderr


def voc(folder: Path, *, stem: str, with_image: bool = True) -> None:
    """One VOC annotation: a 40x30 image with a dog whose 1-based corners are 5, 6, 20, 25."""
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if with_image:
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "JPEGImages" / f"{stem}.jpg")
    (folder / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>{stem}.jpg</filename><size><width>40</width><height>30</height></size>"
        "<object><name>dog</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object>"
        "</annotation>"
    )


def test_importing_voc_reports_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc(tmp_path / "source", stem="one")
    assert main(["data", "import", "voc", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["classes"] == ["dog"]
    assert told["splits"] == {"train": {"images": 1, "boxes": 1}}
    assert (tmp_path / "out" / "dataset.json").is_file()


def test_an_annotation_without_its_image_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voc(tmp_path / "source", stem="there")
    voc(tmp_path / "source", stem="gone", with_image=False)
    assert main(["data", "import", "voc", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert "1 x image that is missing" in said.err and "Annotations/gone.xml" in said.err
    assert json.loads(said.out)["splits"] == {"train": {"images": 1, "boxes": 1}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "no-such-run", "tracking=none"], "no run 'no-such-run'"),
        (["evaluate", "no-such-run", "test"], "write KEY=VALUE"),
        (["predict", "no-such-run", "no-such.jpg", "--out", "out", "tracking=none"], "no picture no-such.jpg"),
    ],
)
def test_bad_input_to_the_other_verbs(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_store_that_fails_in_the_middle_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(BaseHTTPRequestHandler):
        """An MLflow server whose disk is full: it lists no experiments, and refuses all else."""

        def do_POST(self) -> None:
            self.answer(200, b'{"experiments": []}')

        def do_GET(self) -> None:
            told = b'{"error_code": "BAD_REQUEST", "message": "disk full\\nat line 7"}'
            self.answer(*((200, b"OK") if self.path == "/health" else (400, told)))

        def answer(self, status: int, told: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Full) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = main(["leaderboard", f"tracking.uri=http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    told = capsys.readouterr().err
    assert code == 1 and told.count("\n") == 1
    assert told.startswith("onestage: the tracking store fails (") and "disk full" in told


@pytest.mark.slow
def test_from_labels_to_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onestage.data.scenes import draw

    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "digits", seed=3, num_train=16, num_val=4, num_test=6, size=96)
    common = ["tracking=none", "data.root=digits"]
    settings = ["cluster=none", "detector.width=0.25", "detector.input_size=[96,96]", "trainer.max_epochs=2"]
    assert main(["train", *common, *settings, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert main(["evaluate", trained["run_id"], *common, "split=val", "--json"]) == 0
    by_run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert by_run["num_images"] == 4
    best = str(Path(trained["checkpoint"]).with_name("best.ckpt"))
    assert main(["evaluate", best, *common, "split=val", "--json"]) == 0
    by_file = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert by_file["metrics"] == by_run["metrics"]

    Image.fromarray(np.full((60, 90, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    assert main(["predict", trained["run_id"], "grey.png", "tracking=none", "--out", "out", "--json"]) == 0
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert Image.open(tmp_path / "out" / "grey.jpg").size[0] >= 90
    for one in results:
        left, top, width, height = one["bbox"]
        assert 0 <= left < left + width <= 90.02  # rounded to hundredths, twice
        assert 0 <= top < top + height <= 60.02
        assert one["category"] == str(one["category_id"])
