"""What a sweep looks like: trials over time, parallel coordinates, importance of each parameter, what a score costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from onestage.tracking.leaderboard import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STATES: Final = {"done": "#0072B2", "stopped": "#999999", "failed": "#D55E00", "lost": "#E69F00", "cut": "#56B4E9"}
MISSING: Final = "–"
FEWEST: Final = 4
"""Trials with a score, below which no importance is told."""
FEW_MARKS: Final = 4
LOG_FROM: Final = 20.0
"""An axis is logarithmic where the largest value is so many times the smallest."""


def draw(entries: Sequence[Entry], folder: Path, *, metric: str, maximize: bool) -> list[Path]:
    """Writes the pictures of a sweep into ``folder``; their files."""
    sign = 1 if maximize else -1
    pictures: dict[str, Callable[[], Figure]] = {
        "trials": lambda: trials(entries, metric=metric, sign=sign),
        "parallel": lambda: parallel(entries, metric=metric, sign=sign),
        "importance": lambda: importance(entries, metric=metric),
        "pareto": lambda: pareto(entries, metric=metric, sign=sign),
    }
    files = []
    for name, make in pictures.items():
        files.append(folder / f"{name}.png")
        make().savefig(files[-1], dpi=110)
    return files


def trials(entries: Sequence[Entry], *, metric: str, sign: int) -> "Figure":
    """Each trial's score when it ended, and the best of all until then."""
    figure, axes = _figure(9, 5)
    ended = sorted((one for one in entries if one.ended is not None), key=lambda one: one.ended or 0.0)
    start = min((one.started for one in entries if one.started is not None), default=0.0)
    scored = [one for one in ended if one.score is not None]
    for state, colour in STATES.items():
        mine = [one for one in scored if one.state == state]
        if mine:
            hours, scores = _hours(mine, start), np.array([one.score for one in mine])
            bars = np.array([_spread(one) for one in mine]).T
            axes.errorbar(hours, scores, yerr=bars, fmt="o", color=colour, label=state, elinewidth=1, alpha=0.8)
    if scored:
        best = sign * np.maximum.accumulate([sign * (one.score or 0.0) for one in scored])
        end = max(one.ended or 0.0 for one in ended)
        axes.step(
            [*_hours(scored, start), (end - start) / 3600],
            [*best, best[-1]],
            where="post",
            color="black",
            label="best so far",
        )
    bottom = axes.get_ylim()[0]
    if without := [one for one in ended if one.score is None]:
        axes.plot(_hours(without, start), [bottom] * len(without), "x", color=STATES["failed"], label="without a score")
    axes.set(xlabel="hours since the sweep began", ylabel=metric, title=f"{len(ended)} trials")
    if scored or without:
        figure.legend(frameon=False, loc="outside right upper")
    return figure


def parallel(entries: Sequence[Entry], *, metric: str, sign: int) -> "Figure":
    """A line a trial through the values that it had, to its score; the better, the brighter and further in front."""
    from matplotlib import colormaps

    scored = sorted((one for one in entries if one.score is not None), key=lambda one: sign * (one.score or 0.0))
    keys = list(dict.fromkeys(key for one in scored for key in one.point))
    figure, axes = _figure(max(2.2 * (len(keys) + 1), 7), 5)
    if not scored:
        _empty(axes, "no trial has a score")
        return figure
    columns = [Column(key, [one.point.get(key) for one in scored]) for key in keys]
    columns.append(Column(metric, [one.score for one in scored], log=False))
    last = max(len(scored) - 1, 1)
    for rank, _ in enumerate(scored):
        best = rank == len(scored) - 1
        axes.plot(
            range(len(columns)),
            [column.places[rank] for column in columns],
            color=colormaps["viridis"](rank / last),
            linewidth=2.5 if best else 1.0,
            alpha=1.0 if best else 0.6,
            zorder=2 + rank,
        )
    for x, column in enumerate(columns):
        axes.axvline(x, color="#444444", linewidth=1, zorder=1)
        for place, label in column.ticks:
            axes.annotate(
                label, (x, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                zorder=10_000, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    names = [column.key.replace(".", ".\n", 1) if len(column.key) > 14 else column.key for column in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=9)
    axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.1, len(columns) - 0.6))
    axes.spines[:].set_visible(False)
    return figure


class Column:
    """Values on an axis from 0 to 1: numbers by size or its logarithm, words side by side, and none of them below."""

    def __init__(self, key: str, values: Sequence[str | float | None], *, log: bool | None = None) -> None:
        self.key = key
        given = [value for value in values if value is not None]
        numbers = [_number(value) for value in given]
        floor = 0.12 if len(given) < len(values) else 0.0
        self.ticks: list[tuple[float, str]] = [(0.0, MISSING)] if floor else []
        if all(number is not None for number in numbers):
            known = [number for number in numbers if number is not None]
            low, high = min(known), max(known)
            logarithmic = log is not False and low > 0 and high / low >= LOG_FROM

            def scaled(value: float) -> float:
                size: float = math.log(value) if logarithmic else value
                return size

            span = scaled(high) - scaled(low)
            middle = math.exp((scaled(low) + scaled(high)) / 2) if logarithmic else (low + high) / 2
            marks = sorted(set(known)) if len(set(known)) <= FEW_MARKS else [low, middle, high]
            where = {
                mark: floor + (1 - floor) * ((scaled(mark) - scaled(low)) / span if span else 0.5) for mark in marks
            }
            self.ticks += [(place, f"{mark:.3g}") for mark, place in where.items()]
            self.places = [
                0.0 if (number := _number(value)) is None
                else floor + (1 - floor) * ((scaled(number) - scaled(low)) / span if span else 0.5)
                for value in values
            ]  # fmt: skip
        else:
            words = sorted({str(value) for value in given})
            step = (1 - floor) / max(len(words) - 1, 1)
            by_word = {word: floor + step * i if len(words) > 1 else 0.5 for i, word in enumerate(words)}
            self.ticks += [(place, word[:18]) for word, place in by_word.items()]
            self.places = [0.0 if value is None else by_word[str(value)] for value in values]


def importance(entries: Sequence[Entry], *, metric: str) -> "Figure":
    """How much of the score's spread each parameter explains."""
    shares = importances(entries)
    figure, axes = _figure(8, max(1.6 + 0.4 * len(shares), 3))
    if not shares:
        _empty(axes, f"fewer than {FEWEST} trials with a score, or nothing that varied in all of them")
        return figure
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=COLOURS[0])
    for place, name in enumerate(names):
        axes.annotate(
            f"{shares[name]:.0%}", (shares[name], place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.set(xlim=(0, 1.1), xlabel=f"share of the spread of {metric} (fANOVA; of parameters that all trials have)")
    return figure


def importances(entries: Sequence[Entry]) -> dict[str, float]:
    """By parameter, the largest first; {} of too few trials. fANOVA (Hutter et al. 2014), by Optuna."""
    scored = [one for one in entries if one.score is not None and one.point]
    keys = [key for key in dict.fromkeys(k for one in scored for k in one.point) if all(key in o.point for o in scored)]
    if len(scored) < FEWEST or not keys:
        return {}
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {}
    for key in keys:
        values = [one.point[key] for one in scored]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(set(values)) < 2:
            continue
        if len(numbers) == len(values):
            low, high = min(numbers), max(numbers)
            distributions[key] = FloatDistribution(low, high, log=low > 0 and high / low >= LOG_FROM)
        else:
            distributions[key] = CategoricalDistribution(sorted({str(value) for value in values}))
    if not distributions or len({one.score for one in scored}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for one in scored:
        params = {
            k: float(one.point[k]) if isinstance(d, FloatDistribution) else str(one.point[k])
            for k, d in distributions.items()
        }
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=one.score))
    shares: Mapping[str, float] = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {key: float(share) for key, share in shares.items()}


def pareto(entries: Sequence[Entry], *, metric: str, sign: int) -> "Figure":
    """The score against what it costs, to use and to train; the line joins those that nothing beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    scored = [one for one in entries if one.score is not None]
    detectors = list(dict.fromkeys(one.detector for one in scored))
    costs: list[tuple[str, Callable[[Entry], float | None]]] = [
        ("milliseconds an image", lambda one: one.latency_ms),
        ("GPU-hours", lambda one: one.gpu_hours),
    ]
    for axes, (label, cost) in zip(figure.subplots(1, 2), costs, strict=True):
        points = [(one, float(price)) for one in scored if (price := cost(one)) is not None]
        if not points:
            _empty(axes, f"no trial with {label}")
            continue
        for number, name in enumerate(detectors):
            mine = [(price, one.score) for one, price in points if one.detector == name]
            if mine:
                axes.scatter(*zip(*mine, strict=True), s=30, color=COLOURS[number % len(COLOURS)], label=name, zorder=3)
        front = [points[index] for index in front_of([(sign * (one.score or 0.0), price) for one, price in points])]
        axes.step(
            [price for _, price in front], [one.score for one, _ in front], where="post", color="#444444", zorder=2
        )
        for one, price in front:
            axes.annotate(f"#{one.trial}" if one.trial is not None else one.name, (price, one.score or 0.0),
                          xytext=(4, 5), textcoords="offset points", fontsize=8)  # fmt: skip
        axes.set(xlabel=label, ylabel=metric)
        axes.legend(frameon=False, loc="lower right")
    return figure


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (score, cost) no other beats in both, the cheapest first.

    >>> front_of([(0.5, 3.0), (0.4, 1.0), (0.3, 2.0), (0.5, 4.0)])
    [1, 0]
    """
    front, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0])):
        if points[index][0] > best:
            front.append(index)
            best = points[index][0]
    return front


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _empty(axes: "Axes", why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _hours(entries: Sequence[Entry], start: float) -> list[float]:
    return [((one.ended or 0.0) - start) / 3600 for one in entries]


def _spread(one: Entry) -> tuple[float, float]:
    """How far the interval reaches below and above the score."""
    if one.low is None or one.high is None or one.score is None:
        return 0.0, 0.0
    return max(one.score - one.low, 0.0), max(one.high - one.score, 0.0)


def _number(value: str | float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
