"""Gives a model on the meta device its weights, a few parameters at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from transformers import PreTrainedModel

from trainer.config import LoadedConfig
from trainer.model.initialize import Parameters, random_weights, zero_weights
from trainer.model.read import pretrained_weights


@dataclass(frozen=True)
class RandomWeights:
    """The family's own initialization."""

    seed: int


@dataclass(frozen=True)
class PretrainedWeights:
    """A folder, a checkpoint, or a name on the hub."""

    path: str
    allow_unexpected_keys: bool = False


@dataclass(frozen=True)
class ZeroWeights:
    """Zeros, which a checkpoint replaces."""


WeightSource = RandomWeights | PretrainedWeights | ZeroWeights


def configured_weights(loaded: LoadedConfig) -> RandomWeights | PretrainedWeights:
    """Return the source of the weights that a run starts from."""
    section = loaded.config.model
    if loaded.initialize != "pretrained":
        return RandomWeights(loaded.config.run.seed)
    assert section.path is not None
    return PretrainedWeights(section.path, section.allow_unexpected_keys)


def materialize(model: PreTrainedModel, source: WeightSource) -> Iterator[Parameters]:
    """Give the parameters and buffers of a model on the meta device their values.

    Yields parameters as soon as their values are final. The consumer shards or partitions them, which replaces their
    data, before the next ones get memory:

        for parameters in materialize(model, source):
            shard(parameters)
            partition(parameters)

    Raises:
        ConfigError: if weights cannot be read, do not fit the model or are not finite; or if the family leaves a
            parameter without a value.
    """
    match source:
        case RandomWeights(seed):
            yield from random_weights(model, seed)
        case PretrainedWeights(path, allow_unexpected_keys):
            yield from pretrained_weights(model, path, allow_unexpected_keys=allow_unexpected_keys)
        case ZeroWeights():
            yield from zero_weights(model)
        case _:
            assert_never(source)
