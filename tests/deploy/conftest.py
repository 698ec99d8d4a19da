"""What deploy/ holds."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_secrets.sh fills."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run([DEPLOY / "make_secrets.sh", folder], check=True, timeout=30, capture_output=True)
    return folder


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """A Compose file with its variables at their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / name).read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def clean() -> dict[str, str]:
    """This environment without what would lead to other servers than the tests' own."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_", "AWS_", "PG"))}
