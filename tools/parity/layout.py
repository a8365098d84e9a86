"""How a run is divided over processes: one value for the parity tool's command line, its proofs, and the tests."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError, Problem, suggest

Changes = tuple[tuple[str, Any], ...]
"""Values of a configuration, each with its dotted path."""


@dataclass(frozen=True)
class Layout:
    """The processes of a run, how they divide the model and the batch, and what DeepSpeed shards."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int | None = None
    """ZeRO stage; None keeps that of the configuration."""

    sequence_parallel: bool = False
    dualpipev: bool = False
    """DualPipeV instead of 1F1B."""

    accumulation: int | None = None
    """Micro-batches of one data rank in a step; None derives it from the global batch."""

    changes: Changes = ()
    """Further values that the configuration gets."""

    name: str = ""
    """The text on the command line; see `__str__`."""

    @property
    def data(self) -> int:
        """Number of data ranks."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def values(self) -> dict[str, Any]:
        """The configuration's values by dotted path: the layout's own, and `changes`."""
        values: dict[str, Any] = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.pipeline_schedule": "dualpipev" if self.dualpipev else "1f1b",
        }
        if self.zero is not None:
            values["deepspeed.zero_optimization.stage"] = self.zero
        return values | dict(self.changes)

    def apply_to(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a configuration with the layout's values."""
        result = deepcopy(config)
        for path, value in self.values.items():
            *parents, key = path.split(".")
            section = result
            for parent in parents:
                section = section.setdefault(parent, {})
            section[key] = deepcopy(value)
        return result

    def __str__(self) -> str:
        """Return the name, or the differences from one process."""
        if self.name:
            return self.name
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        parts += [] if self.zero is None else [f"zero{self.zero}"]
        parts += ["sequence_parallel"] * self.sequence_parallel + ["dualpipev"] * self.dualpipev
        parts += [] if self.accumulation is None else [f"accumulate{self.accumulation}"]
        parts += [_last_word(path, value) for path, value in self.changes]
        return "-".join(parts) or "one process"


def _last_word(path: str, value: object) -> str:
    return value if isinstance(value, str) else path.rpartition(".")[2]


_KEYS = ("tensor", "pipeline", "dualpipev", "data", "sequence_parallel", "zero", "accumulation")
_BOOLEANS = ("sequence_parallel", "dualpipev")


def parse_layout(text: str) -> Layout:
    """Read `tensor=4,pipeline=2,data=2,sequence_parallel=true,zero=1,accumulation=2`; each key may be omitted.

    Raises:
        ConfigError: with every mistake in it.
    """
    values: dict[str, Any] = {}
    problems = []
    where = f"--layouts {text}"
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            problems.append(Problem(where, f"expected key=value, got '{item}'", "For example tensor=2,data=2,zero=1"))
        elif key not in _KEYS:
            hint = suggest(key, _KEYS)
            problems.append(Problem(where, f"unknown key '{key}'{hint}", "" if hint else f"Known: {', '.join(_KEYS)}"))
        elif key in values:
            problems.append(Problem(where, f"duplicate key '{key}'"))
        else:
            values[key], reason = _parse_value(key, value)
            problems += [Problem(where, reason)] if reason else []
    if problems:
        raise ConfigError(problems)
    world_size = values.get("tensor", 1) * values.get("pipeline", 1) * values.pop("data", 1)
    return Layout(world_size, name=text, **values)


def _parse_value(key: str, value: str) -> tuple[int | bool, str]:
    """Return the value and, if it is invalid, the reason."""
    if key in _BOOLEANS:
        invalid = value not in ("true", "false")
        return value == "true", f"{key}: expected true or false, got '{value}'" if invalid else ""
    lowest, highest = (0, 3) if key == "zero" else (1, 4096)
    number = int(value) if value.isdecimal() else -1
    expected = "0, 1, 2 or 3" if key == "zero" else "a whole number >= 1"
    return number, "" if lowest <= number <= highest else f"{key}: expected {expected}, got '{value}'"


def parse_layouts(texts: list[str]) -> list[Layout]:
    """Read all items of `--layouts`.

    Raises:
        ConfigError: with every mistake in any of them.
    """
    layouts, problems = [], []
    for text in texts:
        try:
            layouts.append(parse_layout(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return layouts
