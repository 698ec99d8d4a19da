"""Hydra's own tests for plugins that run jobs."""

from pathlib import Path
from typing import Any

import pytest
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.test_utils.test_utils import integration_test

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CHDIR = "hydra.job.chdir=True"  # Hydra's suites look for a job's files in its working directory


@pytest.fixture(autouse=True)
def on_our_ray(own_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", own_ray)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "platform"))


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", ["hydra/sweeper=ray_tune", CHDIR])])
class TestLauncher(LauncherTestSuite):
    pass


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/sweeper=ray_tune"])])
class TestIntegration(IntegrationTestSuite):
    def test_to_absolute_path_multirun(self, tmpdir: Any, task_launcher_cfg: Any, extra_flags: list[str]) -> None:
        """Hydra's own, in a folder for each of its two sweeps: ours doesn't write over a sweep."""
        for number, (path, expected) in enumerate([("/foo/bar", "/foo/bar"), ("foo/bar", f"{tmpdir}/foo/bar")]):
            integration_test(
                tmpdir=tmpdir,
                task_config={},
                overrides=[*extra_flags, CHDIR, f"hydra.sweep.dir=dir{number}", "hydra.sweep.subdir=j${hydra.job.num}"],
                prints=[f"hydra.utils.to_absolute_path('{path}')", "os.getcwd()"],
                expected_outputs=[expected, f"{tmpdir}/dir{number}/j0"],
            )
