"""Search space of a sweep, from the command line and `sweep.space`, in Hydra's sweep grammar.

optim.lr=1e-5,3e-5   adapter.rank=choice(4,8)   task.max_length=range(256,1024,256)   values
optim.lr='tag(log,interval(1e-5,1e-3))'   adapter.rank='int(interval(4,64))'           a range
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException

from finetune.compose import split_values, text_settings
from finetune.config import Config
from finetune.errors import UserError


@dataclass(frozen=True)
class Choice:
    """A list of values to choose from, written as they were typed."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A range of numbers, both ends included; integers if both ends are integers."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool


Parameter = Choice | Interval


@dataclass(frozen=True)
class Space:
    fixed: tuple[str, ...]
    """Words that every job has."""
    parameters: tuple[Parameter, ...]

    @property
    def keys(self) -> list[str]:
        return [parameter.key for parameter in self.parameters]

    def words(self, chosen: dict[str, str]) -> list[str]:
        """Return the k=v words of one job."""
        return [*self.fixed, *(f"{key}={value}" for key, value in chosen.items())]


def settings_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into (words of the sweep itself, words of its jobs)."""
    own = [word for word in words if key_of(word).split(".")[0] == "sweep"]
    return own, [word for word in words if word not in own]


def key_of(word: str) -> str:
    return word.lstrip("+~").split("=")[0]


def read_space(words: list[str], space: dict[str, str]) -> Space:
    """Parse what `words` and the configured `space` vary; a typed key replaces the configured one.

    Raises:
        UserError: a word that Hydra cannot read.
    """
    typed = {key_of(word) for word in words}
    words = words + [f"{key}={value}" for key, value in space.items() if key not in typed]
    fixed, parameters = list[str](), list[Parameter]()
    for word in words:
        parameter = _texts(word) if key_of(word) in text_settings(Config) else _parameter(word)
        if parameter is None:
            fixed.append(word)
        else:
            parameters.append(parameter)
    return Space(tuple(fixed), tuple(parameters))


def grid(space: Space) -> list[dict[str, str]]:
    """Return every combination; the last key changes fastest.

    Raises:
        UserError: a range has no list of values.
    """
    for parameter in space.parameters:
        if isinstance(parameter, Interval):
            raise UserError(
                "a grid needs a list of values, not a range",
                parameter.key,
                f"Try {parameter.key}={parameter.low:g},{parameter.high:g}, or draw from the range "
                "with sweep=random or sweep=optuna.",
            )
    lists = [parameter.values for parameter in space.parameters if isinstance(parameter, Choice)]
    return [dict(zip(space.keys, values, strict=True)) for values in itertools.product(*lists)]


def draw(space: Space, seed: int, n: int) -> dict[str, str]:
    """Draw the n-th random job.

    It is a pure function of the seed and n, so that a resumed sweep draws the same jobs.
    """
    source, drawn = random.Random(f"{seed}/{n}"), {}
    for parameter in space.parameters:
        if isinstance(parameter, Choice):
            drawn[parameter.key] = source.choice(parameter.values)
            continue
        if parameter.log:
            value = math.exp(source.uniform(math.log(parameter.low), math.log(parameter.high)))
        else:
            value = source.uniform(parameter.low, parameter.high)
        drawn[parameter.key] = str(round(value)) if parameter.whole else f"{value:.4g}"
    return drawn


def _texts(word: str) -> Parameter | None:
    """Return the values of a text setting as typed; commas in free text do not separate values."""
    key, _, value = word.lstrip("+~").partition("=")
    if text_settings(Config)[key].prose:
        return None
    chosen = re.fullmatch(r"choice\((.*)\)", value.strip(), re.DOTALL)
    values = split_values(chosen[1] if chosen else value)
    return Choice(key, tuple(values)) if chosen or len(values) > 1 else None


def _parameter(word: str) -> Parameter | None:
    """Parse what a word varies in Hydra's grammar; None if it has a single value."""
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return None
        key, value = override.get_key_element(), override.value()
        if not isinstance(value, IntervalSweep):
            return Choice(key, tuple(override.sweep_string_iterator()))
    except (HydraException, ValueError, TypeError) as error:
        raise UserError(
            str(error).split("\nSee https")[0],
            remedy="Separate the values of a sweep by commas: optim.lr=1e-3,5e-3.",
        ) from None
    low, high = value.start, value.end
    if low is None or high is None or not low < high or ("log" in value.tags and low <= 0):
        raise UserError(
            f"the range from {low} to {high} is empty, or not positive on a logarithmic scale",
            key,
            f"Try {key}='tag(log,interval(1e-5,1e-3))'.",
        )
    return Interval(
        key,
        float(low),
        float(high),
        "log" in value.tags,
        isinstance(low, int) and isinstance(high, int),
    )
