"""The shape of a training's config: unknown keys and wrong types are refused when it is composed.

Nodes that name a class by ``_target_`` are open dictionaries here, held to the types of their yaml by ``compose``.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class InputSizes:
    _target_: str = MISSING
    size: list[int] = MISSING
    min: int = MISSING
    max: int = MISSING
    step: int = MISSING
    every: int = MISSING


@dataclass
class Data:
    _target_: str = MISSING
    root: str | None = None
    batch_size: int = MISSING
    global_batch: int | None = None
    num_workers: int | None = None
    input_size: list[int] = MISSING
    input_sizes: InputSizes = field(default_factory=InputSizes)
    fit: str = MISSING
    max_skipped: int = MISSING
    cache: str | None = None
    cache_gib: float = MISSING
    timeout_s: float = MISSING
    retries: int = MISSING
    seed: int = MISSING
    augment: dict[str, Any] = MISSING


@dataclass
class Trainer:
    max_epochs: int = MISSING
    max_steps: int = MISSING
    precision: str = MISSING
    deterministic: bool = MISSING
    gradient_clip: float = MISSING
    ema_decay: float = MISSING
    val_every_epochs: int = MISSING
    log_every_steps: int = MISSING
    num_pictures: int = MISSING


@dataclass
class Checkpoint:
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int = MISSING


@dataclass
class Slurm:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    warn_s: int = MISSING
    requeue: bool = MISSING
    nodes: int | None = None
    cpus_per_node: int | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    memory: str | None = None
    directives: list[str] = MISSING
    modules: list[str] = MISSING
    python: str | None = None
    within: list[str] = MISSING


@dataclass
class Cluster:
    kind: str = MISSING
    address: str | None = None
    num_workers: int = MISSING
    min_workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    global_batch: int | None = None
    sync_norm: bool = MISSING
    max_failures: int = MISSING
    backoff_s: float = MISSING
    start_timeout_s: float = MISSING
    wait: float = MISSING
    hang: float = MISSING
    ship: bool = MISSING
    env: list[str] = MISSING
    slurm: Slurm | None = None


@dataclass
class Tracking:
    kind: str = MISSING
    uri: str | None = None
    experiment: str = MISSING
    every_seconds: float = MISSING


@dataclass
class Asha:
    grace_epochs: int = MISSING
    reduction: float = MISSING


@dataclass
class Pbt:
    every_epochs: int = MISSING
    quantile: float = MISSING


@dataclass
class Sweep:
    name: str | None = None
    search: str | None = None
    scheduler: str = MISSING
    metric: str = MISSING
    direction: str = MISSING
    asha: Asha = field(default_factory=Asha)
    pbt: Pbt = field(default_factory=Pbt)
    max_concurrent: int | None = None
    retries: int = MISSING
    champion: str | None = None
    search_space: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    trials: int | None = None
    hours: float | None = None
    gpu_hours: float | None = None


@dataclass
class Train:
    seed: int = MISSING
    name: str | None = None
    resume: str | None = None
    storage: str = MISSING
    output: str = MISSING
    detector: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    augment: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: Trainer = field(default_factory=Trainer)
    cluster: Cluster = field(default_factory=Cluster)
    tracking: Tracking = field(default_factory=Tracking)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    sweep: Sweep = field(default_factory=Sweep)
    budget: Budget = field(default_factory=Budget)
    on_oom: str = MISSING
    experiment: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Makes the schema known to Hydra as ``schema``, the first entry of train.yaml's defaults."""
    ConfigStore.instance().store(name="schema", node=Train)
