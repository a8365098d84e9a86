"""Styles of weights along the vocabulary, and of embeddings: they may be padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from trainer.sharding.shard import Shard, shard_of
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_inputs, on_output
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import (
    ColumnStyle,
    ModuleTarget,
    ParameterStyle,
    ParameterTarget,
    Shape,
    ShardedStyle,
    padded_shard,
)
from trainer.tensor_parallel.units import parse_integer


@dataclass(frozen=True)
class VocabularyHead(ColumnStyle):
    """The head sharded along the vocabulary; its logits stay sharded: `vocabulary_head`."""

    name: ClassVar[str] = "vocabulary_head"

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        dim = self.shard_dim(target.module, target.shape)
        assert dim is not None
        return (padded_shard(target, dim, rank, ranks),)

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, region.enter)


@dataclass(frozen=True)
class VocabularyParameter(ParameterStyle):
    """One number for each token of the vocabulary, sharded as the head is: `vocabulary:dimension`."""

    name: ClassVar[str] = "vocabulary"

    dim: int

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the dimension."""
        return cls(parse_integer(argument))

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return str(self.dim)

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        return (padded_shard(target, self.dim, rank, ranks),)


@dataclass(frozen=True)
class VocabularyEmbedding(ParameterStyle):
    """An embedding sharded along the vocabulary: `embedding_rowwise`."""

    name: ClassVar[str] = "embedding_rowwise"

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        if len(target.shape) == 1:
            return super().shards(target, rank, ranks)
        return (padded_shard(target, 0, rank, ranks),)

    def install(self, region: Region, target: ModuleTarget) -> None:
        """Make each rank look up the ids that it holds, use zero for the others, and sum over the ranks."""
        table = target.module
        assert isinstance(table, nn.Embedding)
        shard = shard_of(table.weight)
        part = None if shard is None else shard.along("tensor")
        assert part is not None
        rows = part.local_size
        first = part.index * rows
        padding = table.padding_idx
        table.padding_idx = padding - first if padding is not None and 0 <= padding - first < rows else None
        missing: list[Tensor] = []
        """Mask (batch, sequence) of the ids of the current call that are on other ranks."""

        def localize(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if not args:
                (key,) = kwargs
                args, kwargs = (kwargs[key],), {}
            ids_BT = args[0] - first
            missing_BT = (ids_BT < 0) | (ids_BT >= rows)
            missing.append(missing_BT)
            return (ids_BT.masked_fill(missing_BT, 0), *args[1:]), kwargs

        def reduce(_: nn.Module, __: tuple[Any, ...], vectors_BTD: Tensor) -> Tensor:
            return region.reduce(vectors_BTD.masked_fill(missing.pop().unsqueeze(-1), 0))

        table.register_forward_pre_hook(localize, with_kwargs=True)
        table.register_forward_hook(reduce)


@dataclass(frozen=True)
class EmbeddingColumn(ShardedStyle):
    """An embedding sharded along the vector, with its outputs gathered again: `embedding_colwise`."""

    name: ClassVar[str] = "embedding_colwise"

    def shard_dim(self, module: nn.Module, shape: Shape) -> int | None:
        """See `ShardedStyle.shard_dim`."""
        return None if len(shape) == 1 else 1

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_output(target.module, lambda vectors: collectives.gather_from_region(vectors, -1, region.group))
