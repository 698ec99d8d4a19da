"""What is refused before any Ray starts."""

from pathlib import Path

import pytest
import ray
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.test_utils import TSweepRunner

from hydra_plugins.ray_tune_sweeper._journal import NAME, Journal

from .conftest import sweeping


def test_hydra_finds_the_plugin() -> None:
    assert "RayTuneSweeper" in [found.__name__ for found in Plugins.instance().discover(Sweeper)]


def sweep(hydra_sweep_runner: TSweepRunner, folder: Path, *overrides: str) -> None:
    with sweeping(hydra_sweep_runner, folder, *overrides):
        pass


@pytest.mark.usefixtures("hydra_restore_singletons")
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fooo=1,2"], "fooo"),
        (["group1=file1,file9"], "file9"),  # the second choice, which no first trial would have met
        (["foo=interval(2,1)"], "low < high"),
        (["group1=glob(nothing*)"], "empty"),
        (["foo=interval(1,2)"], "give hydra.sweeper.trials"),
        (["foo=interval(1,2)", "hydra.sweeper.search=grid"], "can't list the interval"),
        (["foo=1,2", "hydra.sweeper.search=bayes"], "there are grid, random and optuna"),
        (["foo=1,2", "hydra.sweeper.scheduler=bohb"], "there are none, asha, median and pbt"),
        (["foo=1,2", "hydra.sweeper.scheduler=pbt"], "the space has none"),
        (["foo=1,2", "hydra.sweeper.direction=up"], "minimize and maximize"),
        (["foo=1,2", "hydra.sweeper.trails=3"], "trails"),
        (["foo=1,2", "hydra.sweeper.trials=0"], "give more than 0"),
        (["foo=1,2", "+hydra.sweeper.search_space={bar: {values: [1], when: {foo: 3}}}"], "it only has 1, 2"),
    ],
)
def test_before_anything_starts(
    hydra_sweep_runner: TSweepRunner, tmp_path: Path, overrides: list[str], says: str
) -> None:
    before = ray.is_initialized()
    with pytest.raises(HydraException) as refused:
        sweep(hydra_sweep_runner, tmp_path, *overrides)
    assert says in f"{refused.value} {refused.value.__cause__}"
    assert ray.is_initialized() is before
    assert Journal.read(tmp_path).trials == {}


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_another_launcher(hydra_sweep_runner: TSweepRunner, tmp_path: Path) -> None:
    ConfigStore.instance().store(group="hydra/launcher", name="other", node={"_target_": "some.Launcher"})
    with pytest.raises(HydraException, match="hydra/launcher=other: Ray launches the trials"):
        sweep(hydra_sweep_runner, tmp_path, "foo=1,2", "hydra/launcher=other")


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_a_folder_that_holds_a_sweep(hydra_sweep_runner: TSweepRunner, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.add("sweep", space={"foo": "another"}, metric="objective", direction="minimize")
    journal.add("trial", trial=0, point={"foo": 1}, overrides=["foo=1"])
    journal.close()
    written = (tmp_path / NAME).read_bytes()
    with pytest.raises(HydraException, match=r"resume=true, or give another hydra.sweep.dir"):
        sweep(hydra_sweep_runner, tmp_path, "foo=1,2")
    assert (tmp_path / NAME).read_bytes() == written
    with pytest.raises(HydraException, match="holds a sweep with space"):
        sweep(hydra_sweep_runner, tmp_path, "foo=1,2", "hydra.sweeper.resume=true")
