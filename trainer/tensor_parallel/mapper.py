"""Apply a tensor-parallel plan to a model: shard its parameters as their values arrive, then change its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.distributed import World
from trainer.distributed.collectives import Group
from trainer.sharding import Joiner, Shard, VocabularyShard, set_shard, shard_of
from trainer.tensor_parallel.audit import resolve_plan
from trainer.tensor_parallel.experts import choose_experts_implementation
from trainer.tensor_parallel.gradient_watch import GradientWatch
from trainer.tensor_parallel.key_value_groups import correct_key_value_groups
from trainer.tensor_parallel.layers import join_shards, resize, shard_key, sum_gradient
from trainer.tensor_parallel.plan import Plan, PlanEntry
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.sequence import SequenceParallel, refuse_sequence_parallel
from trainer.tensor_parallel.styles import Divide


class Mapper(Protocol):
    """Applies a tensor-parallel plan to a model on one rank."""

    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Replace the value of each parameter, which is full, by this rank's shard.

        Returns:
            The parameters, and the ones added for a fused weight of which several ranks share some matrices: these
            matrices have a parameter of their own.
        """

    def install(self) -> None:
        """Change the modules to compute with their shards. Collective: all ranks must call it."""

    def end_forward(self, device: torch.device) -> None:
        """Clear the region's caches and RNG after a forward pass that stopped at a stage boundary.

        The model's own hook, which clears the caches at the end of a full pass, did not run.
        """

    def vocabulary_shard(self) -> VocabularyShard:
        """Return the columns of the logits that the model returns on this rank."""

    def full_buffer(self, name: str, buffer: Tensor) -> Tensor:
        """Return a buffer in full. Collective: all ranks of the tensor group must call it."""

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """Yield this rank's shards of a buffer, as views with their records."""

    def verify_gradients(self) -> None:
        """Compare gradients after the first backward pass. Collective: all ranks of the tensor group must call it.

        Raises:
            PlanError: if ranks that hold the same weight have different gradients for it; the error names the weight.
        """


CopyGroups = Callable[[int], Group]
"""Returns this rank's group of neighboring tensor ranks that hold a part, by their number."""


_OTHER_HEADS = re.compile("classif|summary|qa_|pooler")
"""Substring in the names of unused dropout rates of language models: GPT-NeoX's classifier_dropout is 0.1."""


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Return whether any dropout module, or any rate of a module or a configuration, is nonzero."""
    modules = list(model.modules())
    holders = [*modules, *(m.config for m in modules if isinstance(getattr(m, "config", None), PreTrainedConfig))]
    named = [(key, value) for holder in holders for key, value in vars(holder).items() if "drop" in key]
    rates = [value for key, value in named if isinstance(value, float) and not _OTHER_HEADS.search(key)]
    rates += [module.p for module in modules if isinstance(module, nn.Dropout)]
    return any(rate > 0 for rate in rates)


class TensorMapper:
    """Shards one model for one rank.

    1. On construction every parameter gets its record (`shard_of`), while it is full or on the meta device.
    2. `shard_parameters` takes parameters with their full value and leaves them this rank's shard.
    3. `install` changes the modules, once all parameters are sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        region: Region,
        copy_groups: CopyGroups,
        *,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Attach the records of `plan` to the parameters of `model`.

        Args:
            model: its parameters are full, or on the meta device.
            plan: of this model and rank.
            region: of this model; see `model_region`.
            copy_groups: makes groups of neighboring tensor ranks.
            sequence_parallel: whether hidden states are sharded along the sequence between the regions.
            dtype: of the computation; by default that of the parameters.
        """
        self._model, self._plan, self._region = model, plan, region
        self._copy_groups = copy_groups
        self._sequence_parallel = sequence_parallel
        self._shards: dict[str, tuple[Shard, ...]] = {}
        for entry in plan.entries:
            set_shard(entry.parameter, entry.shards[0])
            self._shards[entry.name] = entry.shards
        choose_experts_implementation(model, dtype or next(model.parameters()).dtype)

    def vocabulary_shard(self) -> VocabularyShard:
        """See `Mapper.vocabulary_shard`."""
        head = self._model.get_output_embeddings()
        shard = None if head is None else shard_of(head.weight)
        if shard is None or shard.is_full:
            return VocabularyShard()
        region = self._region
        return VocabularyShard(shard.full_shape[0], shard.local_shape()[0], region.group, region.rank, region.ranks)

    @torch.no_grad()
    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Mapper.shard_parameters`."""
        sharded = []
        for parameter in list(parameters):
            shard = shard_of(parameter)
            assert shard is not None
            sharded.append(parameter)
            shards = self._shards[shard.name]
            if shard.owner_only and not shard.owner:
                parameter.requires_grad_(False).zero_()
            if parameter.shape != shard.full_shape or all(part.is_full for part in shards):
                continue
            full = parameter.data
            parameter.data = shards[0].extract(full)
            owner, _, key = shard.name.rpartition(".")
            for number, part in enumerate(shards[1:], start=1):
                additional = nn.Parameter(part.extract(full), parameter.requires_grad)
                set_shard(additional, part)
                self._model.get_submodule(owner).register_parameter(shard_key(key, number), additional)
                sharded.append(additional)
        return sharded

    def install(self) -> None:
        """See `Mapper.install`."""
        shared = {entry.name: shard for entry in self._plan.entries for shard in entry.shards if shard.copies > 1}
        for copies in sorted({shard.copies for shard in shared.values()}):
            self._copy_group(copies)  # on all pipeline stages, because all ranks must create every group
        correct_key_value_groups(self._model, dict(self._shared_heads(shared)), self._region.ranks)
        self._plan = self._plan.local_to(self._model)
        for entry in self._plan.entries:
            self._finish(entry)
        self._shard_buffers()
        self._install_styles()
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
        """See `Mapper.full_buffer`. Collective: all ranks of the tensor group must call it."""
        joiner = Joiner(lambda axis: self._region.group)
        full = buffer
        for shard, view in self.buffer_shards(name, buffer):
            for _, joined in joiner.add(name, view, shard):
                full = joined
        return full

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """See `Mapper.buffer_shards`."""
        start = 0
        for shard in self._plan.buffers.get(name, (Shard.full(name, buffer.shape, owner=self._region.rank == 0),)):
            part = shard.along("tensor")
            if part is None:
                yield shard, buffer
                continue
            yield shard, buffer.narrow(part.dim, start, part.local_size)
            start += part.local_size

    def verify_gradients(self) -> None:
        """See `Mapper.verify_gradients`. Collective: all ranks of the tensor group must call it."""
        self._watch.verify()

    def _shared_heads(self, shared: Mapping[str, Shard]) -> Iterator[tuple[str, int]]:
        """Yield (name, units) of each weight whose units several ranks share."""
        for entry in self._plan.entries:
            if entry.name in shared and entry.is_divided:
                part = shared[entry.name].along("tensor")
                yield entry.name, 1 if part is None else part.count

    def _finish(self, entry: PlanEntry) -> None:
        """Sum the gradients of parameters that several ranks hold and use on sharded activations."""
        owner, _, key = entry.name.rpartition(".")
        module = self._model.get_submodule(owner)
        if len(entry.shards) > 1 and key == "weight":
            join_shards(module, len(entry.shards))
        for parameter, shard in entry.local_parameters(module):
            if shard.copies > 1:
                sum_gradient(parameter, self._copy_group(shard.copies))

    def _copy_group(self, copies: int) -> Group:
        """Return this rank's group of the `copies` ranks that hold a part."""
        return self._region.group if copies == self._region.ranks else self._copy_groups(copies)

    def _shard_buffers(self) -> None:
        for name, shards in self._plan.buffers.items():
            owner, _, key = name.rpartition(".")
            module = self._model.get_submodule(owner)
            full = module.get_buffer(key)
            part = shards[0].along("tensor")
            if part is not None:
                setattr(module, key, torch.cat([shard.extract(full) for shard in shards], dim=part.dim))

    def _install_styles(self) -> None:
        """Install the styles of blocks before those of the modules in them, then correct the modules' sizes."""
        targets = self._plan.targets
        for target in sorted(targets, key=lambda target: target.name.count(".")):
            for style in target.styles:
                style.install(self._region, target)
        for target in targets:
            if not all(isinstance(style, Divide) for style in target.styles):
                resize(target.module)


class IdentityMapper:
    """The mapper for one tensor rank: nothing is sharded."""

    def shard_parameters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Mapper.shard_parameters`."""
        return list(parameters)

    def install(self) -> None:
        """See `Mapper.install`."""

    def end_forward(self, device: torch.device) -> None:
        """See `Mapper.end_forward`."""

    def vocabulary_shard(self) -> VocabularyShard:
        """See `Mapper.vocabulary_shard`."""
        return VocabularyShard()

    def full_buffer(self, name: str, buffer: Tensor) -> Tensor:
        """See `Mapper.full_buffer`."""
        return buffer

    def buffer_shards(self, name: str, buffer: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        """See `Mapper.buffer_shards`."""
        yield Shard.full(name, buffer.shape), buffer

    def verify_gradients(self) -> None:
        """See `Mapper.verify_gradients`."""


def model_region(model: PreTrainedModel, group: Group, ranks: int, rank: int) -> Region:
    """Return the tensor-parallel region of a model for `rank` of the `ranks` in `group`."""
    has_dropout = has_active_dropout(model)
    return Region(group, ranks, rank, has_dropout=has_dropout, is_training=lambda: model.training)


def build_mapper(
    model: PreTrainedModel,
    user: Mapping[str, str],
    world: World,
    *,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Mapper:
    """Return the mapper of `model` for this rank.

    Args:
        model: its parameters are full, or on the meta device.
        user: `parallel.tensor_plan`.
        world: the joined world.
        sequence_parallel: `parallel.sequence_parallel`.
        dtype: of the computation.

    Raises:
        PlanError: if the plan and the model do not fit together, or no implementation of the experts takes their
            widths.
    """
    topology = world.topology
    if topology.tensor == 1:
        choose_experts_implementation(model, dtype)
        return IdentityMapper()
    plan = resolve_plan(model, user, topology.tensor, topology.tensor_rank)
    region = model_region(model, world.groups.of("tensor"), topology.tensor, topology.tensor_rank)
    copy_groups = world.groups.tensor_subgroup
    return TensorMapper(model, plan, region, copy_groups, sequence_parallel=sequence_parallel, dtype=dtype)
