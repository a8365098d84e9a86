"""Weight decay and learning rate scale of each weight, by Hugging Face name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import nn

from trainer.config.schema import TrainingSection
from trainer.errors import ConfigError, Problem, suggest
from trainer.sharding import wildcard_name

_EXCLUDE, _SCALES = "training.weight_decay_exclude", "training.learning_rate_scales"


class WeightOptions(NamedTuple):
    """Options of the optimizer for a weight; weights with equal options form a parameter group."""

    decays: bool = True
    scale: float = 1.0
    """Factor of the learning rate."""


def weight_options(model: nn.Module, training: TrainingSection, *, decay: float) -> dict[str, WeightOptions]:
    """Return the options of every trained weight of a full model, by its first Hugging Face name.

    They follow from the full model, so they are the same on every rank and in every layout.

    Args:
        model: on any device; only names, shapes and the classes of modules are read.
        training: the configuration's section.
        decay: the optimizer's weight decay. If it is 0, excluding a weight has no effect and forms no group.

    Raises:
        ConfigError: if a pattern matches no weight, or two scales apply to the same weight.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    exclude, scales = training.weight_decay_exclude, training.learning_rate_scales
    patterns = [] if isinstance(exclude, str) else exclude
    problems = [*_unmatched(_EXCLUDE, patterns, model, trained), *_unmatched(_SCALES, scales, model, trained)]
    excluded = _excluded(model, trained, exclude)
    options = {}
    for name in trained:
        matching = [pattern for pattern in scales if _matches(pattern, name)]
        if len(matching) > 1:
            both = " and ".join(f"'{pattern}'" for pattern in matching)
            problems.append(Problem(_SCALES, f"{both} match '{name}'", "At most one pattern may match a weight"))
        scale = scales[matching[0]] if matching else 1.0
        options[name] = WeightOptions(decay == 0 or name not in excluded, scale)
    if problems:
        raise ConfigError(problems)
    return options


def _excluded(
    model: nn.Module, trained: Mapping[str, nn.Parameter], exclude: Sequence[str] | Literal["biases_and_norms"]
) -> set[str]:
    if exclude != "biases_and_norms":
        return {name for name in trained if any(_matches(pattern, name) for pattern in exclude)}
    return {name for name, weight in trained.items() if weight.ndim <= 1 or _is_bias_or_norm(model, name)}


def _is_bias_or_norm(model: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key.endswith("bias") or "norm" in type(model.get_submodule(owner)).__name__.lower()


def _matches(pattern: str, name: str) -> bool:
    """Whether a full name matches a pattern, in which `*` stands for any text, dots included."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def _unmatched(
    key: str, patterns: Iterable[str], model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> Iterator[Problem]:
    """Yield a problem for every pattern that matches no trained weight."""
    for pattern in patterns:
        if any(_matches(pattern, name) for name in trained):
            continue
        problem = f"'{pattern}' matches no trained weight"
        first = {weight: name for name, weight in trained.items()}
        everywhere = model.named_parameters(remove_duplicate=False)
        tied = next((first[w] for name, w in everywhere if w in first and _matches(pattern, name)), None)
        suggestion = suggest(pattern, _candidates(trained))
        if tied is not None:
            yield Problem(key, f"{problem}, but a name that is tied to '{tied}'", f"Write '{tied}'")
        elif suggestion:
            yield Problem(key, f"{problem}{suggestion}")
        else:
            yield Problem(key, problem, f"Names are full Hugging Face names, such as '{next(iter(trained), '')}'")


def _candidates(names: Iterable[str]) -> list[str]:
    """Return patterns to suggest for a misspelled one: names, names with `*` for layers, ends of names after `*.`."""
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        ends = ("*." + ".".join(parts[-count:]) for count in (1, 2, 3) if count < len(parts))
        candidates.update(dict.fromkeys((name, wildcard_name(name), *ends)))
    return list(candidates)
