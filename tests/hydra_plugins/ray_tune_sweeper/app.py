"""Any Hydra app, as the sweeper's tests run it: it learns x in some epochs, and goes on from what its folder holds."""

import time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

ConfigStore.instance().store(name="app", node={"x": 0.0, "kind": "a", "epochs": 3, "pause": 0.0, "farewell": 0.0})


@hydra.main(version_base=None, config_path=None, config_name="app")
def main(cfg: DictConfig) -> float:
    from ray import tune

    folder = Path(HydraConfig.get().runtime.output_dir)
    learnt = int((folder / "learnt").read_text()) if (folder / "learnt").exists() else 0
    try:
        for epoch in range(learnt + 1, cfg.epochs + 1):
            time.sleep(cfg.pause)
            (folder / "learnt").write_text(str(epoch))
            tune.report({"loss": cfg.x**2 + 1 / epoch, "epoch": epoch})
    finally:
        time.sleep(cfg.farewell)
        (folder / "farewell").touch()
    return float(cfg.x**2)


if __name__ == "__main__":
    main()
