"""A search space from Hydra's override grammar: what may be varied, where it exists, and how a point becomes overrides.

A point maps each parameter that exists in it to its value: the text of a choice as an override spells it, or a number
of an interval. Nothing here draws at random by itself: whoever walks the space says what to take.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep, Transformer
from hydra.errors import HydraException

Value = str | float
Point = dict[str, Value]


@dataclass(frozen=True)
class Choices:
    """Values to take one of; ``texts`` as an override spells them, ``plain`` as ``when`` compares them."""

    texts: tuple[str, ...]
    plain: tuple[str, ...]
    ordered: bool  # rising numbers: what is near in the list is near in its effect
    spaced: bool  # evenly, as a range

    @property
    def ends(self) -> tuple[Value, ...]:
        """What has to compose for all to compose: every choice, of a range its ends."""
        return (self.texts[0], self.texts[-1]) if self.spaced else self.texts


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``; whole ones, both ends included, where the override casts to int."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def at(self, u: float) -> float:
        """The number at the fraction ``u``, 0 <= u < 1, of the interval; of its logarithm where ``log``."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        low = max(low, 0.5) if self.log and self.whole else low
        number = low * (high / low) ** u if self.log else low + u * (high - low)
        return self.within(number)

    def within(self, number: float) -> float:
        """The nearest number of the interval."""
        number = min(max(number, self.low), self.high)
        return round(number) if self.whole else number


@dataclass(frozen=True)
class Parameter:
    """What varies under ``key``, an override's left side; ``when`` another has one of some values, or always."""

    key: str
    domain: Choices | Interval
    when: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def exists(self, point: Mapping[str, Value]) -> bool:
        return all(point.get(other) in allowed for other, allowed in self.when.items())


@dataclass(frozen=True)
class Space:
    """Parameters, each behind those that its ``when`` names, and the overrides of every trial, both in their order."""

    parameters: tuple[Parameter, ...]
    order: tuple[tuple[str, str | None], ...]  # of a trial's overrides: a key, and its line where that is fixed

    def walk(self, choose: Callable[[Parameter], Value]) -> Point:
        """The point with the chosen value of each parameter that exists, asked for in order."""
        point: Point = {}
        for parameter in self.parameters:
            if parameter.exists(point):
                point[parameter.key] = choose(parameter)
        return point

    def draw(self, seed: int, number: int) -> Point:
        """Draw ``number``: a pure function of seed and number, and of each parameter apart from the others."""

        def choose(parameter: Parameter) -> Value:
            u = random.Random(f"{seed}/{number}/{parameter.key}").random()
            domain = parameter.domain
            return domain.at(u) if isinstance(domain, Interval) else domain.texts[int(u * len(domain.texts))]

        return self.walk(choose)

    def grid(self) -> Iterator[Point]:
        """Every point, the first parameter slowest. Raises HydraException where an interval has no end of points."""
        for parameter in self.parameters:
            if isinstance(parameter.domain, Interval):
                raise HydraException(
                    f"search=grid can't list the interval of '{parameter.key}': give it choices or a range(), "
                    "or take hydra.sweeper.search=random or optuna"
                )

        def below(point: Point, rest: Sequence[Parameter]) -> Iterator[Point]:
            if not rest:
                yield point
            elif not rest[0].exists(point):
                yield from below(point, rest[1:])
            else:
                assert isinstance(rest[0].domain, Choices)
                for text in rest[0].domain.texts:
                    yield from below({**point, rest[0].key: text}, rest[1:])

        return below({}, self.parameters)

    def probes(self) -> list[Point]:
        """Points that hold every choice, and the ends of every interval, at least once."""
        by_key = {parameter.key: parameter for parameter in self.parameters}

        def needs(parameter: Parameter) -> Point:
            needed: Point = {}
            for other, allowed in parameter.when.items():
                domain = by_key[other].domain
                assert isinstance(domain, Choices)
                needed |= needs(by_key[other]) | {other: next(text for text in domain.texts if text in allowed)}
            return needed

        def complete(needed: Point) -> Point:
            return self.walk(lambda parameter: needed.get(parameter.key, parameter.domain.ends[0]))

        points = [complete({})]
        for parameter in self.parameters:
            points += [complete({**needs(parameter), parameter.key: end}) for end in parameter.domain.ends]
        return [point for i, point in enumerate(points) if point not in points[:i]]

    def perturb(self, point: Point, rng: random.Random, resample: float) -> Point:
        """The point with its numbers of intervals changed by a fifth, or with probability ``resample`` drawn anew."""
        changed = dict(point)
        for parameter in self.parameters:
            domain, value = parameter.domain, point.get(parameter.key)
            if isinstance(domain, Interval) and isinstance(value, int | float):
                near = domain.within(value * rng.choice((0.8, 1.2)))
                changed[parameter.key] = domain.at(rng.random()) if rng.random() < resample else near
        return changed

    def overrides(self, point: Point) -> list[str]:
        """What a trial at this point is composed with, in the order of the command line."""
        return [line or f"{key}={point[key]}" for key, line in self.order if line or key in point]

    def describe(self) -> dict[str, Any]:
        """The space in plain values, to be compared with that of another day."""
        return {
            one.key: {
                "values": list(one.domain.texts)
                if isinstance(one.domain, Choices)
                else ["interval", one.domain.low, one.domain.high, one.domain.log, one.domain.whole],
                "when": {other: sorted(allowed) for other, allowed in one.when.items()},
            }
            for one in self.parameters
        }


def _plain(value: Any) -> str:
    return value.text if isinstance(value, QuotedString) else str(value)


def domain_of(override: Override, seed: int) -> Choices | Interval:
    """What an override of a sweep spans. Raises HydraException where that is nothing."""
    where = f"'{override.input_line}'"
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        log, low, high = "log" in sweep.tags, sweep.start, sweep.end
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise HydraException(f"{where}: an interval needs finite ends with low < high, got {low} and {high}")
        if log and low <= 0:
            raise HydraException(f"{where}: tag(log, …) needs an interval above 0, got {low}")
        return Interval(low, high, log, isinstance(low, int) and isinstance(high, int))
    if "log" in getattr(sweep, "tags", ()):
        raise HydraException(f"{where}: tag(log, …) is for an interval()")
    shuffled = getattr(sweep, "shuffle", False)
    if shuffled:
        sweep.shuffle = False  # type: ignore[union-attr]  # Hydra's own would be another order each time
    values: list[Any] = list(override.sweep_iterator())
    if shuffled:
        random.Random(f"{seed}/{override.get_key_element()}").shuffle(values)
    if not values:
        raise HydraException(f"{where} is empty: there is nothing to try")
    rising = len(values) > 2 and all(type(value) in (int, float) for value in values)
    return Choices(
        tuple(Transformer.str(value) for value in values),
        tuple(_plain(value) for value in values),
        rising and all(a < b for a, b in itertools.pairwise(values)),
        isinstance(sweep, RangeSweep),
    )


def _from_yaml(key: str, entry: Any) -> tuple[str, Mapping[str, Any]]:
    """The override that an entry of ``search_space`` stands for, and its condition."""
    when: Mapping[str, Any] = {}
    if isinstance(entry, Mapping):
        if "values" not in entry or not set(entry) <= {"values", "when"}:
            raise HydraException(f"search_space.{key}: give values, and perhaps when; got {', '.join(map(str, entry))}")
        entry, when = entry["values"], entry.get("when") or {}
    if isinstance(entry, list):
        if not entry:
            raise HydraException(f"search_space.{key} is empty: there is nothing to try")
        entry = f"choice({','.join(Transformer.str(value) for value in entry)})"
    return f"{key}={entry if isinstance(entry, str) else Transformer.str(entry)}", when


def parse(
    arguments: Sequence[str],
    search_space: Mapping[str, Any],
    *,
    seed: int = 0,
    parser: OverridesParser | None = None,
    present: Callable[[str], Any] = lambda key: None,
) -> Space:
    """The space of a command line and of ``search_space``; the command line's word on a key is the last.

    Args:
        present: The value that the app's config has by itself, of a key that ``when`` names and nobody sweeps.

    Raises HydraException: an empty interval or choice, a condition that can't hold.
    """
    parser = parser or OverridesParser.create()
    given = {override.get_key_element(): override for override in parser.parse_overrides(list(arguments))}
    conditions: dict[str, Mapping[str, Any]] = {}
    overrides: dict[str, Override] = {}
    for key, entry in search_space.items():
        line, when = _from_yaml(str(key), entry)
        if key not in given:
            overrides[str(key)], conditions[str(key)] = parser.parse_override(line), when
    overrides |= given

    domains = {key: domain_of(one, seed) for key, one in overrides.items() if one.is_sweep_override()}
    parameters: list[Parameter] = []

    def conditions_of(key: str) -> dict[str, frozenset[str]] | None:
        """The conditions on other parameters; None where a fixed value already says that it doesn't exist."""
        result: dict[str, frozenset[str]] = {}
        for other, wanted in conditions.get(key, {}).items():
            plain = {_plain(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
            domain = domains.get(other)
            if isinstance(domain, Interval):
                raise HydraException(f"search_space.{key}: when needs choices, '{other}' is an interval")
            if domain is not None:
                allowed = frozenset(text for text, own in zip(domain.texts, domain.plain, strict=True) if own in plain)
                if not allowed:
                    has = ", ".join(domain.plain)
                    raise HydraException(f"search_space.{key}: when {other} is {', '.join(plain)}: it only has {has}")
                result[other] = allowed
            elif _plain(overrides[other].value() if other in overrides else present(other)) not in plain:
                return None
        return result

    waiting = {key: conditions_of(key) for key in domains}
    dropped = {key for key, when in waiting.items() if when is None}
    while waiting:
        placed = {parameter.key for parameter in parameters} | dropped
        ready = next((key for key, when in waiting.items() if when is None or set(when) <= placed), None)
        if ready is None:
            raise HydraException(f"search_space: conditions in a circle: {', '.join(waiting)}")
        needed = waiting.pop(ready)
        if needed is None or set(needed) & dropped:
            dropped.add(ready)
        else:
            parameters.append(Parameter(ready, domains[ready], needed))
    order = [(key, None if key in domains else one.input_line) for key, one in overrides.items()]
    return Space(tuple(parameters), tuple(order))
