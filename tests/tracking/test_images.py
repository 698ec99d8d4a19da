"""What an image card shows of a picture is large enough to see its boxes."""

import io
from pathlib import Path

import PIL.Image
import pytest

from onestage.tracking import runs
from onestage.tracking.client import client
from onestage.tracking.images import log_picture


@pytest.mark.parametrize(("size", "preview"), [((2048, 600), (1024, 300)), ((300, 200), (300, 200))])
def test_a_preview_has_up_to_1024_pixels_and_the_picture_is_there_whole(
    store: str, tmp_path: Path, size: tuple[int, int], preview: tuple[int, int]
) -> None:
    run_id = runs.open_run(store, "previews", tags={})
    log_picture(client(store), run_id, PIL.Image.new("RGB", size, "red"), key="val/image", step=40, time_ms=7)
    names = [Path(file.path).name for file in client(store).list_artifacts(run_id, "images")]
    sizes = {}
    for name in names:
        assert name.startswith("val~image+step+40+timestamp+7+")
        file = Path(client(store).download_artifacts(run_id, f"images/{name}", str(tmp_path)))
        sizes[file.suffix] = PIL.Image.open(io.BytesIO(file.read_bytes())).size
    assert sizes == {".png": size, ".webp": preview}
    assert client(store).get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
