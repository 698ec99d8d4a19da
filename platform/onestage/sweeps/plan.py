"""What a sweep would do, before it does anything: which trials there would be, and of how many epochs."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from onestage.cluster import resources
from onestage.cluster.preflight import check
from onestage.config import compose
from onestage.config.space import fixed, space_of
from onestage.data.manifest import Manifest
from onestage.errors import InputError
from onestage.tracking.leaderboard import LOSS, MAP

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._space import Space

MAX_LISTED: Final = 200
SHARED: Final = ("cluster.", "tracking.", "storage", "resume", "sweep.", "budget.", "data.root", "name", "output")
"""Keys that all trials of a sweep have in common."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``config`` is what all trials share, checked; ``probes`` one checked config for every choice of the space."""

    overrides: list[str]
    config: dict[str, Any]
    settings: dict[str, Any]  # the config's sweep
    budget: dict[str, Any]
    space: "Space"
    probes: list[dict[str, Any]] = field(repr=False)

    @property
    def search(self) -> str:
        from hydra_plugins.ray_tune_sweeper._space import Choices

        listed = all(isinstance(one.domain, Choices) for one in self.space.parameters)
        return self.settings["search"] or ("grid" if listed else "random")

    @property
    def trials(self) -> int | None:
        """How many there will be at most; None where only hours end the sweep."""
        grid = sum(1 for _ in self.space.grid()) if self.search == "grid" else math.inf
        most = min(grid, self.budget["trials"] or math.inf)
        return None if most == math.inf else int(most)

    def points(self) -> list[list[str]] | None:
        """The overrides of the first trials, as far as they are known before any has ended."""
        points: Iterable[Mapping[str, Any]]
        if self.search == "grid":
            points = itertools.islice(self.space.grid(), min(self.trials or MAX_LISTED, MAX_LISTED))
        elif self.search == "random":
            many = range(min(self.trials or 10, MAX_LISTED))
            points = (self.space.draw(self.config["seed"], number) for number in many)
        else:
            return None
        return [self.space.overrides(dict(point)) for point in points]

    @property
    def max_epochs(self) -> int:
        return max(int(one["trainer"]["max_epochs"]) for one in self.probes)

    def epochs(self) -> tuple[float, float] | None:
        """All trials' epochs: at most, and to be expected under the scheduler."""
        if self.trials is None:
            return None
        most = self.trials * self.max_epochs
        if self.settings["scheduler"] != "asha":
            return most, most
        asha = self.settings["asha"]
        return most, self.trials * expected_epochs(self.max_epochs, asha["grace_epochs"], asha["reduction"])


def expected_epochs(max_epochs: int, grace: int, reduction: float) -> float:
    """Of one trial under ASHA whose rank among the others is as good as any.

    >>> expected_epochs(9, 1, 3)  # all reach 1, a third 3, a ninth 9: 1 + 2 / 3 + 6 / 9
    2.333...
    """
    total, share, before, rung = 0.0, 1.0, 0.0, float(grace)
    while rung < max_epochs:
        total += share * (rung - before)
        share, before, rung = share / reduction, rung, rung * reduction
    return total + share * (max_epochs - before)


def plan(overrides: Sequence[str]) -> Plan:
    """Composes and checks what is asked. Raises InputError for all that can be known to be wrong by now."""
    config = compose("train", fixed(overrides))
    settings, budget = config["sweep"], config["budget"]
    if config["cluster"]["kind"] == "none":
        raise InputError("cluster=none: the trials of a sweep run on Ray; use cluster=local or cluster=ray")
    if config["resume"]:
        raise InputError("resume=… goes on with one training; with a sweep: onestage sweep resume NAME")
    space = space_of("train", overrides)
    if config["name"] is not None:
        raise InputError(f"name={config['name']} would name every trial alike: sweep.name=… names the sweep")
    if not space.parameters:
        raise InputError("nothing varies: give choices (seed=1,2), an interval, or a space (sweep=lr)")
    for parameter in space.parameters:
        if parameter.key in ("data", "cluster", "tracking", "sweep") or parameter.key.startswith(SHARED):
            raise InputError(f"{parameter.key} is one for all trials of a sweep: give it one value")
    composed = [compose("train", space.overrides(point)) for point in space.probes()]
    _check_names(settings, budget)
    _check_search(settings, budget, space)
    if settings["scheduler"] == "asha":
        _check_asha(settings["asha"], composed)
    checked = check(config)
    _check_metric(settings, checked)
    return Plan(
        overrides=list(overrides),
        config=checked,
        settings=settings,
        budget=budget,
        space=space,
        probes=[check(one) for one in composed],
    )


def side_by_side(cluster: Mapping[str, Any], nodes: Sequence[resources.Node]) -> int:
    """How many trials these nodes hold when they are empty. Raises InputError where that is none."""
    worker = resources.of_worker(cluster)
    least: int = cluster["min_workers"] or cluster["num_workers"]
    fit = resources.num_fitting(nodes, worker, empty=True) // least
    if not fit:
        wanted = cluster["num_workers"]
        told = resources.shortage(list(nodes), wanted=wanted, least=least, worker=worker, fitting=0)
        raise InputError(f"a trial never fits: {told}")
    return fit


def _check_names(settings: Mapping[str, Any], budget: Mapping[str, Any]) -> None:
    for key, known in (
        ("search", (None, "grid", "random", "optuna")),
        ("scheduler", ("none", "asha", "median", "pbt")),
        ("direction", ("maximize", "minimize")),
    ):
        if settings[key] not in known:
            raise InputError(f"sweep.{key}={settings[key]}: there are {', '.join(one for one in known if one)}")
    if settings["name"] is not None and not re.fullmatch(r"\w[\w.-]*", str(settings["name"])):
        raise InputError(f"sweep.name={settings['name']}: use letters, digits, and . _ - inside")
    if settings["max_concurrent"] is not None and settings["max_concurrent"] < 1:
        raise InputError(f"sweep.max_concurrent={settings['max_concurrent']}: give at least 1, or null")
    if settings["retries"] < 0:
        raise InputError(f"sweep.retries={settings['retries']}: give 0 or more")
    for key, value in budget.items():
        if value is not None and value <= 0:
            raise InputError(f"budget.{key}={value}: give more than 0, or null")


def _check_search(settings: Mapping[str, Any], budget: Mapping[str, Any], space: "Space") -> None:
    """What can't be listed, never ends, or doesn't go together."""
    from hydra_plugins.ray_tune_sweeper._space import Interval

    intervals = [one.key for one in space.parameters if isinstance(one.domain, Interval)]
    search = settings["search"] or ("random" if intervals else "grid")
    if search == "grid" and intervals:
        raise InputError(f"sweep.search=grid can't list the interval of {intervals[0]}: take random or optuna")
    if search != "grid" and not any(budget.values()):
        raise InputError(f"{search} search has no end: give budget.trials, budget.hours or budget.gpu_hours")
    if settings["scheduler"] == "pbt":
        if not intervals:
            raise InputError("sweep.scheduler=pbt changes intervals while they train, and nothing here is one")
        if search == "optuna":
            raise InputError("sweep.scheduler=pbt changes what optuna has chosen: take sweep.search=random")
        if settings["pbt"]["every_epochs"] < 1 or not 0 < settings["pbt"]["quantile"] <= 0.5:
            raise InputError("sweep.pbt: need every_epochs >= 1 and 0 < quantile <= 0.5")


def _check_asha(asha: Mapping[str, Any], composed: Sequence[Mapping[str, Any]]) -> None:
    if asha["grace_epochs"] < 1 or asha["reduction"] <= 1:
        raise InputError("sweep.asha: need grace_epochs >= 1 and reduction > 1")
    shortest = min(one["trainer"]["max_epochs"] for one in composed)
    if asha["grace_epochs"] > shortest:
        raise InputError(
            f"sweep.asha.grace_epochs={asha['grace_epochs']} is beyond trainer.max_epochs={shortest}: "
            "no trial would ever be stopped"
        )


def _check_metric(settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """A metric that no validation has would be found out after the first epoch of the first trial."""
    metric, least = settings["metric"], settings["direction"] == "minimize"
    if metric == LOSS:
        if not least:
            raise InputError("sweep.metric=val/loss is better the smaller it is: set sweep.direction=minimize")
        return
    if metric not in (MAP, "val/map_50"):
        from onestage.metrics.mean_ap import MeanAP  # brings torch with it

        classes = Manifest.load(config["data"]["root"]).classes
        known = [f"val/{name}" for name in (*MeanAP.NAMES, *(f"ap/{one}" for one in classes), "loss")]
        if metric not in known:
            raise InputError(f"sweep.metric={metric} is never reported; a validation has {', '.join(known)}")
    if least:
        raise InputError(f"sweep.metric={metric} is better the larger it is: set sweep.direction=maximize")
