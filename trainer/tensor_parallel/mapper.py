"""Cuts a model by its plan: parameters first, as their values arrive, then the modules around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.distributed import World
from trainer.distributed.collectives import Group
from trainer.sharding.join import Joiner
from trainer.sharding.shard import Shard, set_shard, shard_of
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel.experts import choose_experts_implementation
from trainer.tensor_parallel.gradient_watch import GradientWatch
from trainer.tensor_parallel.key_value_groups import correct_key_value_groups
from trainer.tensor_parallel.layers import INSTALL, resize, share_pieces, sum_gradient
from trainer.tensor_parallel.plan import Plan, PlanEntry, read_plan
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.sequence import SequenceParallel, refuse_sequence_parallel


class Mapper(Protocol):
    """What stands between a model that is being made and the engine that trains it."""

    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Leaves each parameter, which holds its whole value, this rank's part.

        Returns them, and with them those that had to be made for parts that several ranks share.
        """

    def install(self) -> None:
        """Changes the modules to compute with their parts."""

    def end_forward(self, device: torch.device) -> None:
        """The model's forward pass has ended before its end, on a pipeline's stage."""

    def cross_entropy(self, smoothing: float, z_loss: float, chunk_tokens: int | None) -> VocabularyCrossEntropy:
        """The loss over the logits that the model gives on this rank."""

    def full_buffer(self, name: str, buffer: Tensor) -> Tensor:
        """The whole of a buffer of which each rank has a part. On all ranks."""

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """What this rank holds of a buffer, as views, each with the record of which part of the whole it is."""

    def verify_gradients(self) -> None:
        """After the first backward pass, on all ranks: whether whole weights have the same gradient everywhere.

        Raises:
            PlanError: naming the weight that has not.
        """


CopyGroups = Callable[[int], Group]
"""From a number of neighbouring tensor ranks that share a part to this rank's group of them."""


_OF_OTHER_HEADS = re.compile("classif|summary|qa_|pooler")
"""In the names of dropout rates that a language model does not use, and has: GPT-NeoX's classifier_dropout is 0.1."""


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Whether some dropout is active in the model, be it a module or a rate that a module or a configuration holds."""
    modules = list(model.modules())
    replica_count = [*modules, *(m.config for m in modules if isinstance(getattr(m, "config", None), PreTrainedConfig))]
    named = [(key, value) for holder in replica_count for key, value in vars(holder).items() if "drop" in key]
    rates = [value for key, value in named if isinstance(value, float) and not _OF_OTHER_HEADS.search(key)]
    rates += [module.p for module in modules if isinstance(module, nn.Dropout)]
    return any(rate > 0 for rate in rates)


class TensorMapper:
    """Cuts one model for one rank.

    1. On construction every parameter gets its record (`shard_of`), while it is still whole or on the meta device.
    2. `shard_parameters` takes parameters that have their whole value and leaves them this rank's part of it.
    3. `install` changes the modules, once all parameters are cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        group: Group,
        ranks: int,
        rank: int,
        copy_groups: CopyGroups,
        *,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Args:
        dtype: of the computation; by default that of the parameters.
        """
        self._model, self._plan = model, plan
        self._region = Region(
            group, ranks, rank, has_dropout=has_active_dropout(model), is_training=lambda: model.training
        )
        self._copy_groups = copy_groups
        self._sequence_parallel = sequence_parallel
        self._shards: dict[str, tuple[Shard, ...]] = {}
        for entry in plan.entries:
            set_shard(entry.parameter, entry.shards[0])
            self._shards[entry.name] = entry.shards
        choose_experts_implementation(model, dtype or next(model.parameters()).dtype)

    def cross_entropy(self, smoothing: float, z_loss: float, chunk_tokens: int | None) -> VocabularyCrossEntropy:
        """See `Mapper.cross_entropy`."""
        head = self._model.get_output_embeddings()
        shard = None if head is None else shard_of(head.weight)
        if shard is None or shard.is_full:
            return VocabularyCrossEntropy(smoothing, z_loss, chunk_tokens)
        return VocabularyCrossEntropy(
            smoothing,
            z_loss,
            chunk_tokens,
            vocabulary=shard.full_shape[0],
            width=shard.local_shape()[0],
            group=self._region.group,
            rank=self._region.rank,
            ranks=self._region.ranks,
        )

    @torch.no_grad()
    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Mapper.shard_parameters`."""
        made = []
        for parameter in list(parameters):
            shard = shard_of(parameter)
            assert shard is not None
            made.append(parameter)
            shards = self._shards[shard.name]
            if shard.owner_only and not shard.owner:
                parameter.requires_grad_(False).zero_()
            if parameter.shape != shard.full_shape or all(piece.is_full for piece in shards):
                continue
            whole = parameter.data
            parameter.data = shards[0].extract(whole)
            owner, _, key = shard.name.rpartition(".")
            for number, piece in enumerate(shards[1:], start=1):
                extra = nn.Parameter(piece.extract(whole), parameter.requires_grad)
                set_shard(extra, piece)
                self._model.get_submodule(owner).register_parameter(f"{key}_piece{number}", extra)
                made.append(extra)
        return made

    def install(self) -> None:
        """See `Mapper.install`."""
        shared = {p.name: piece for p in self._plan.entries for piece in p.shards if piece.copies > 1}
        for copies in sorted({piece.copies for piece in shared.values()}):
            self._copy_group(copies)  # on all pipeline stages, as all ranks make every group
        heads = {p.name: shared[p.name].of for p in self._plan.entries if p.name in shared and p.is_divided}
        correct_key_value_groups(self._model, heads, self._region.ranks)
        self._plan = self._plan.local_to(self._model)
        for entry in self._plan.entries:
            self._finish(entry)
        self._cut_buffers()
        resized = [target.module for target in self._plan.modules if any(s.word != "divide" for s in target.styles)]
        blocks_first = sorted(self._plan.modules, key=lambda target: target.name.count("."))
        for target in blocks_first:
            for style in target.styles:
                INSTALL[style.word](self._region, target, style)
        for module in resized:
            resize(module)
        if self._sequence_parallel:
            refuse_sequence_parallel(self._model, self._plan, has_active_dropout=self._region.has_dropout)
            SequenceParallel(self._model, self._plan, self._region).install()
        self._model.register_forward_hook(lambda *_: self._region.clear_cache())
        self._watch = GradientWatch(self._model, self._plan, self._region.group, self._region.ranks)

    def end_forward(self, device: torch.device) -> None:
        """See `Mapper.end_forward`."""
        self._region.clear_cache()
        self._region.use_shared_rng(device)

    def full_buffer(self, name: str, buffer: Tensor) -> Tensor:
        """See `Mapper.full_buffer`."""
        joiner = Joiner(self._region.group, self._region.ranks)
        whole = buffer
        for piece, part in self.buffer_shards(name, buffer):
            for _, joined in joiner.add(name, part, piece):
                whole = joined
        return whole

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """See `Mapper.buffer_shards`."""
        begin = 0
        for piece in self._plan.buffers.get(name, (Shard.full(name, buffer.shape, owner=self._region.rank == 0),)):
            if not piece.full_shape:
                yield piece, buffer
                continue
            length = piece.local_shape()[piece.dim]
            yield piece, buffer.narrow(piece.dim, begin, length)
            begin += length

    def verify_gradients(self) -> None:
        """See `Mapper.verify_gradients`."""
        self._watch.verify()

    def _finish(self, entry: PlanEntry) -> None:
        """Sums the gradients of what several ranks hold and use on sharded activations."""
        owner, _, key = entry.name.rpartition(".")
        module = self._model.get_submodule(owner)
        if len(entry.shards) > 1 and key == "weight":
            share_pieces(module, len(entry.shards))
        for held, piece in entry.held(module):
            if piece.copies > 1:
                sum_gradient(held, self._copy_group(piece.copies))

    def _copy_group(self, copies: int) -> Group:
        """This rank's group of the `copies` ranks that hold a part."""
        return self._region.group if copies == self._region.ranks else self._copy_groups(copies)

    def _cut_buffers(self) -> None:
        for buffer_name, shards in self._plan.buffers.items():
            owner, _, key = buffer_name.rpartition(".")
            module = self._model.get_submodule(owner)
            whole = module._buffers[key]
            assert whole is not None
            module._buffers[key] = torch.cat([piece.extract(whole) for piece in shards], dim=shards[0].dim)


class IdentityMapper:
    """The mapper where there is one tensor rank: nothing is cut."""

    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Mapper.shard_parameters`."""
        return list(parameters)

    def install(self) -> None:
        """See `Mapper.install`."""

    def end_forward(self, device: torch.device) -> None:
        """See `Mapper.end_forward`."""

    def cross_entropy(self, smoothing: float, z_loss: float, chunk_tokens: int | None) -> VocabularyCrossEntropy:
        """See `Mapper.cross_entropy`."""
        return VocabularyCrossEntropy(smoothing, z_loss, chunk_tokens)

    def full_buffer(self, name: str, buffer: Tensor) -> Tensor:
        """See `Mapper.full_buffer`."""
        return buffer

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """See `Mapper.buffer_shards`."""
        yield Shard.full(name, buffer.shape), buffer

    def verify_gradients(self) -> None:
        """See `Mapper.verify_gradients`."""


def build_mapper(
    model: PreTrainedModel,
    user: Mapping[str, str],
    world: World,
    *,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Mapper:
    """What cuts `model` for this rank.

    Args:
        user: `parallel.tensor_plan`.
        sequence_parallel: `parallel.sequence_parallel`.
        dtype: of the computation.

    Raises:
        PlanError: if the plan and the model do not fit together, or no implementation of the experts takes their
            widths.
    """
    place = world.topology
    if place.tensor == 1:
        choose_experts_implementation(model, dtype)
        return IdentityMapper()
    plan = read_plan(model, user, place.tensor, place.tensor_rank)
    return TensorMapper(
        model,
        plan,
        world.groups.of("tensor"),
        place.tensor,
        place.tensor_rank,
        world.groups.tensor_subgroup,
        sequence_parallel=sequence_parallel,
        dtype=dtype,
    )
