"""Names and shapes in weight files, as transformers converts them to those of a model and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from trainer.compat.dependency_check import check_names
from trainer.compat.transformers.names import MODEL, TRANSFORMERS

check_names(TRANSFORMERS, MODEL)

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["KeyMatch", "KeyMatcher", "WeightConverter", "convert", "dot_natural_key", "is_stacking"]


class KeyMatch(NamedTuple):
    """The tensor of a model that a key in weight files belongs to."""

    name: str
    """Of the model's tensor."""

    pattern: str
    """Source pattern of the converter that the key matches; empty without a converter."""

    converter: WeightConverter | None
    """Makes the model's tensor out of those in the files; None where they are the same."""


class KeyMatcher:
    """Matches the keys of weight files with the names of a model's tensors, by transformers' own rules."""

    def __init__(self, model: PreTrainedModel, names: Mapping[str, Tensor], *, has_file_names: bool = True) -> None:
        """Prepare the rules of a model.

        Args:
            model: whose family's rules apply.
            names: tensors of the model, by name.
            has_file_names: whether the keys are those of a published model; else they are the model's own.
        """
        self._transforms: list[WeightTransform] = get_model_conversion_mapping(model) if has_file_names else []
        self._renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in self._transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix, self._names = model.base_model_prefix, dict(names)

    def match(self, key: str) -> KeyMatch | None:
        """Return the match of a key; None where the model has no tensor for it."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._names)
        if name not in self._names and key in self._names:
            name, pattern = rename_source_key(key, [], [], self._prefix, self._names)
        if name not in self._names:
            return None
        return KeyMatch(name, pattern or "", None if pattern is None else self._by_pattern[pattern])

    def record_on(self, model: PreTrainedModel) -> None:
        """Store the rules that matched on the model, for `to_file_tensors` to revert."""
        _set_conversions(model, [transform for transform in self._transforms if transform.was_used()])


def _set_conversions(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    model._weight_conversions = conversions  # type: ignore[assignment]


def is_stacking(converter: WeightConverter) -> bool:
    """Return whether each source of a converter is a chunk of its target.

    Such converters stack sources along a new first dimension, and join those of several patterns along the next one.
    """
    match converter.operations:
        case [MergeModulelist(dim=0)] | [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
        case _:
            return False


def convert(
    converter: WeightConverter,
    name: str,
    sources: Iterable[tuple[str, str]],
    read: Callable[[str], Tensor],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """Convert tensors of the files to those of the model, by name; one converter may make several.

    Args:
        converter: of the family.
        name: of the model's tensor that matched.
        sources: key in the files, and the pattern that it matches.
        read: returns the full tensor of a key.
        model: that the tensors are for.
    """
    fresh = copy.deepcopy(converter)
    for key, pattern in sources:
        fresh.add_tensor(name, key, pattern, read(key))  # type: ignore[arg-type]
    converted = fresh.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


def use_published_names(model: PreTrainedModel) -> None:
    """Prepare a model that was not loaded from files for `to_file_tensors`: write what the family publishes."""
    if getattr(model, "_weight_conversions", None) is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        _set_conversions(model, [each for each in conversions if not isinstance(each, PrefixChange)])


def to_file_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names and in the shapes of weight files."""
    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted
