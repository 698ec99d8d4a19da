"""The Compose files: what may reach the services, what they are told, and that what is made at random stays."""

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from .conftest import DEPLOY, compose

SCHEMA = Path(__file__).parents[3] / "shared" / "schemas" / "compose-spec.json"
FILES = ("compose.yaml", "compose.gpu.yaml")


@pytest.mark.parametrize("name", FILES)
def test_is_what_the_specification_has(name: str) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"no schema: {SCHEMA} is not here")
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(compose(name))


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def test_every_port_answers_to_this_machine_alone() -> None:
    ports = [port for one in services().values() for port in one.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]


def test_every_secret_comes_from_a_file_that_the_script_makes(secrets: Path) -> None:
    files = {name: Path(one["file"]) for name, one in compose()["secrets"].items()}
    assert {file.parts[0] for file in files.values()} == {"secrets"}
    assert {file.name for file in files.values()} == {file.name for file in secrets.iterdir()}
    for one in services().values():
        assert set(one.get("secrets", [])) <= files.keys()
        told = [f"{key}={value}" for key, value in one.get("environment", {}).items()]
        for word in ("PASSWORD", "SECRET", "TOKEN", "KEY"):
            assert all("/run/secrets/" in setting for setting in told if word in setting.partition("=")[0])


def test_what_the_script_made_it_leaves_and_nobody_else_comes_in(secrets: Path) -> None:
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    subprocess.run([DEPLOY / "make_secrets.sh", secrets], check=True, timeout=30, capture_output=True)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == before
    assert before["postgres_password"] in before["pg_service.conf"]
    [identity] = json.loads(before["s3_identities"])["identities"]
    [credentials] = identity["credentials"]
    assert (
        credentials["accessKey"] in before["aws_credentials"] and credentials["secretKey"] in before["aws_credentials"]
    )
    assert len({before["postgres_password"], before["ray_token"], credentials["secretKey"]}) == 3


def test_what_stays_up_starts_again_and_is_asked_how_it_is() -> None:
    for name, one in services().items():
        if name == "bucket":
            continue
        assert one["restart"] == "unless-stopped", name
        assert "healthcheck" in one or name.startswith("ray-"), name  # these have the image's
    assert all(one["cap_drop"] == ["ALL"] for name, one in services().items() if name in ("mlflow", "ray-head"))


def test_a_worker_has_the_time_that_a_checkpoint_takes() -> None:
    from onestage.cluster.jobs import STOP_S

    assert services()["ray-worker"]["stop_grace_period"] == f"{STOP_S}s"


def test_only_the_image_and_the_devices_differ_on_gpus() -> None:
    over = compose("compose.gpu.yaml")["services"]
    ours = {name for name, one in services().items() if one["image"].startswith("onestage:")}
    assert over.keys() == ours
    assert {one["image"] for one in over.values()} == {"onestage:cuda"}
    [device] = over["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
