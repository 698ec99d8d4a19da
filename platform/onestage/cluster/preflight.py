"""What can be known to be wrong before a run is opened, and how this machine is shared out."""

import json
import os
from pathlib import Path
from typing import Any, Final

from onestage.cluster.storage import RunFolder
from onestage.data.manifest import Manifest
from onestage.data.store import StoreSettings, is_address
from onestage.data.threads import num_cores
from onestage.errors import InputError
from onestage.tracking.redaction import without_user

FITS: Final = ("letterbox", "stretch")
PRECISIONS: Final = ("32-true", "bf16-mixed", "16-mixed")  # the weights are float32 in all of them

LEAST: Final = {
    ("data", "batch_size"): 1,
    ("cluster", "num_workers"): 1,
    ("cluster", "cpus_per_worker"): 1,
    ("cluster", "gpus_per_worker"): 0,
    ("trainer", "max_epochs"): 1,
    ("trainer", "val_every_epochs"): 1,
    ("checkpoint", "keep"): 1,
    ("checkpoint", "every_steps"): 0,
    ("checkpoint", "every_minutes"): 0,
    ("tracking", "every_seconds"): 0,
}


def check(config: dict[str, Any]) -> dict[str, Any]:
    """The config with paths made absolute and shares of the machine worked out, and without a store's password.

    It is kept with the run, and goes to whoever gets the model. The job's ``tracking_uri`` has the password.
    Raises InputError for what a person should know before a run is opened.
    """
    config = json.loads(json.dumps({key: value for key, value in config.items() if key not in ("sweep", "budget")}))
    data, cluster, tracking = config["data"], config["cluster"], config["tracking"]
    config["overrides"] = [without_user(one) for one in config["overrides"]]
    tracking["uri"] = tracking["uri"] and without_user(tracking["uri"])
    if data["root"] is None:
        raise InputError("data.root is not set: name a dataset folder, as data.root=shards/bccd")
    if not is_address(data["root"]):
        data["root"] = os.path.abspath(data["root"])
    if data["cache"] is not None:
        data["cache"] = os.path.abspath(os.path.expanduser(data["cache"]))
    if not is_address(config["storage"]):
        config["storage"] = os.path.abspath(config["storage"])
    if data["fit"] not in FITS:
        raise InputError(f"data.fit must be one of {', '.join(FITS)}, got {data['fit']!r}")
    try:
        settings = StoreSettings(**{key: data[key] for key in ("cache", "cache_gib", "timeout_s", "retries")})
    except ValueError as error:
        raise InputError(str(error)) from error
    manifest = Manifest.load(data["root"], settings=settings)
    classes = len(manifest.classes)
    if is_address(data["root"]) and not any(one.startswith("detector.num_classes=") for one in config["overrides"]):
        config["detector"]["num_classes"] = classes  # of a folder, compose has read it
    wanted = config["detector"]["num_classes"]
    if classes != wanted:
        raise InputError(
            f"detector.num_classes is {wanted}, but {data['root']} has {classes} classes "
            f"({', '.join(manifest.classes[:8])}): leave detector.num_classes out"
        )
    if missing := [split for split in ("train", "val") if split not in manifest.splits]:
        raise InputError(
            f"{data['root']} has no split {' and no '.join(missing)}: training needs both; import the set again "
            f"(`onestage data import ... --val 0.2` splits one that has no splits of its own)"
        )
    if config["detector"].get("fit_anchors"):
        from onestage.fitting import fitted  # brings torch with it

        config = fitted(config)
    weights = config["detector"].get("weights")
    if weights is not None and not weights.startswith("torchvision://"):  # a worker knows the names
        config["detector"]["weights"] = os.path.abspath(weights)  # workers have another current folder
        if not os.path.isfile(weights) and not _goes_on(config):
            raise InputError(f"detector.weights: no file {weights}")
    for (group, key), least in LEAST.items():
        if config[group][key] is not None and config[group][key] < least:
            raise InputError(f"{group}.{key} must be at least {least}, got {config[group][key]}")
    if config["trainer"]["precision"] not in PRECISIONS:
        raise InputError(
            f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {config['trainer']['precision']!r}"
        )
    _check_cluster(cluster)
    if cluster["global_batch"] is None and cluster["min_workers"] not in (None, cluster["num_workers"]):
        cluster["global_batch"] = data["batch_size"] * cluster["num_workers"]  # a step stays what it is
    data["global_batch"] = cluster["global_batch"]
    if data["max_skipped"] < 0:
        raise InputError(f"data.max_skipped must be at least 0, got {data['max_skipped']}")
    steps = config["trainer"]["max_steps"]
    if steps != -1 and steps < 1:
        raise InputError(f"trainer.max_steps must be at least 1, or -1 for no limit, got {steps}")
    if config["on_oom"] not in ("fail", "shrink"):
        raise InputError(f"on_oom must be fail or shrink, got {config['on_oom']!r}")
    if config["output"] not in ("text", "json"):
        raise InputError(f"output must be text or json, got {config['output']!r}")
    if cluster["kind"] != "ray":  # what a cluster has, it is asked itself
        _share_machine(cluster)
    return config


def _check_cluster(cluster: dict[str, Any]) -> None:
    least, most = cluster["min_workers"], cluster["num_workers"]
    if least is not None and not 1 <= least <= most:
        raise InputError(f"cluster.min_workers must be from 1 to cluster.num_workers={most}, got {least}")
    if least not in (None, most) and cluster["kind"] != "ray":
        raise InputError(f"cluster.min_workers={least} needs a cluster that can lose a node: use cluster=ray")
    for key, low in (("global_batch", 1), ("max_failures", 0), ("backoff_s", 0), ("hang", 0)):
        if cluster[key] is not None and cluster[key] < low:
            raise InputError(f"cluster.{key} must be at least {low}, got {cluster[key]}")
    if cluster["global_batch"] is not None and cluster["global_batch"] < most:
        raise InputError(
            f"cluster.global_batch={cluster['global_batch']} leaves some of {most} workers without an image: lower "
            f"cluster.num_workers"
        )
    if cluster["wait"] <= 0:
        raise InputError(f"cluster.wait must be more than 0 minutes, got {cluster['wait']}")


def _goes_on(config: dict[str, Any]) -> bool:
    """Whether a checkpoint takes the place of the first weights."""
    if not config["resume"]:
        return False
    return RunFolder(config["storage"], config["resume"]).fetch_checkpoint(lambda _: None) is not None


def num_gpus() -> int:
    """The GPUs of this machine, asked without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one and one != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _share_machine(cluster: dict[str, Any]) -> None:
    cores, gpus, workers = num_cores(), num_gpus(), cluster["num_workers"]
    if cluster["kind"] == "none" and workers > 1:
        raise InputError(f"cluster=none is one process, got cluster.num_workers={workers}: use cluster=local")
    if cluster["gpus_per_worker"] is None:
        cluster["gpus_per_worker"] = 1 if gpus >= workers else 0
    if cluster["gpus_per_worker"] * workers > gpus:
        raise InputError(
            f"{workers} workers of cluster.gpus_per_worker={cluster['gpus_per_worker']} need more than "
            f"this machine's {gpus} GPUs"
        )
    if cluster["cpus_per_worker"] is None:
        cluster["cpus_per_worker"] = max(cores // workers, 1)  # more workers than cores are slow, but train the same
    elif cluster["cpus_per_worker"] * workers > cores:
        raise InputError(
            f"{workers} workers of cluster.cpus_per_worker={cluster['cpus_per_worker']} need "
            f"{cluster['cpus_per_worker'] * workers} cores, but this machine has {cores}"
        )
