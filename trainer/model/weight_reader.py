"""Reads weight files into a model on the meta device; of each tensor only the shard that this rank holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.transformers.conversion import convert
from trainer.compat.transformers.models import patterns_of_computed
from trainer.model.initialize import Parameters, initialize_submodule
from trainer.model.unexpected_keys import MAX_LISTED
from trainer.model.weight_files import WeightFiles
from trainer.model.weight_targets import Offset, Target
from trainer.sharding import Shard, local_and_remote_parameters, shard_of

_Read = Callable[[Tensor, Shard], None]
"""Copies the shard of a full tensor into a local one."""


class WeightReader:
    """Materializes the parameters of a model, and fills its buffers, from weight files."""

    def __init__(self, model: PreTrainedModel, files: WeightFiles) -> None:
        self._model, self._files = model, files
        self._owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        """Modules and keys of each parameter that has not been read yet."""

        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(parameter, []).append((module, key))
        self._unread = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(model.named_buffers())
        self._remote = {name for name, _ in local_and_remote_parameters(model)} - self._unread.keys()
        self.mismatched: list[str] = []
        """Tensors whose shapes differ, for messages."""

        self.non_finite: list[str] = []
        """Tensors whose part on this rank has NaN or infinity, for messages."""

    def read(self, target: Target) -> Iterator[Parameters]:
        """Read a target, or all tensors that its converter makes; but nothing that another pipeline stage holds."""
        if target.name in self._remote:
            return
        offsets = target.source_offsets(self._files)
        if offsets is None:
            assert target.converter is not None
            tensors = convert(target.converter, target.name, target.sources, self._files.read, self._model)
            for name, full in tensors.items():
                yield from self._materialize(name, tuple(full.shape), _extract_from(full), target)
            return

        def read_blocks(local: Tensor, shard: Shard) -> None:
            _read_blocks(local, shard, offsets, self._files)

        yield from self._materialize(target.name, self._full_shape(offsets), read_blocks, target)

    def _full_shape(self, offsets: dict[str, Offset]) -> tuple[int, ...]:
        ends = [
            [start + size for start, size in zip(offset, _block_shape(self._shape(key), offset), strict=True)]
            for key, offset in offsets.items()
        ]
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files.view(key).get_shape())

    def _materialize(self, name: str, shape: tuple[int, ...], read: _Read, target: Target) -> Iterator[Parameters]:
        """Read one tensor of the model, whose full shape in the files is `shape`."""
        if name in self._buffers:
            read(self._buffers[name], Shard.full(name, shape, owner=True))
            self._check_finite(name, self._buffers[name], target)
            return
        parameter = self._unread.pop(name, None)
        if parameter is None or parameter not in self._owners:  # another name of a weight that has been read
            return
        if tuple(parameter.shape) != shape:
            self.mismatched.append(f"{name}: expected {list(parameter.shape)}, got {list(shape)}")
            return
        shard = shard_of(parameter)
        if shard is None or not shard.covers_full_tensor:
            shard = Shard.full(name, shape, owner=True)
        local = nn.Parameter(torch.zeros(shard.local_shape(), dtype=parameter.dtype), parameter.requires_grad)
        vars(local).update(vars(parameter))
        with torch.no_grad():
            read(local, shard)
        self._check_finite(name, local.detach(), target)
        for module, key in self._owners.pop(parameter):
            setattr(module, key, local)
        yield [local]

    def _check_finite(self, name: str, local: Tensor, target: Target) -> None:
        """Record NaN or infinity in the values that were read. Takes one pass and no memory: minimum and maximum."""
        if not local.is_floating_point() or not local.numel():
            return
        if all(bool(bound.isfinite()) for bound in torch.aminmax(local)):
            return
        if len(self.non_finite) >= MAX_LISTED:  # the remaining ones are only counted
            self.non_finite.append(name)
            return
        count_before = len(self.non_finite)
        for key, _ in target.sources:
            full = self._files.read(key).to(local.dtype)
            if count := int((~full.isfinite()).sum()):
                self.non_finite.append(f"{key} in {self._files.file_of(key)}: {count} of {full.numel()} values")
        if len(self.non_finite) == count_before:
            self.non_finite.append(f"{name}: after the conversion by transformers")

    def initialize_computed(self) -> Iterator[Parameters]:
        """Initialize parameters that no file holds because the family computes them."""
        computed = [re.compile(pattern) for pattern in patterns_of_computed(self._model)]
        for name in self.missing():
            is_unset = self._model.get_parameter(name).is_meta
            if is_unset and any(pattern.search(name) for pattern in computed):
                yield from initialize_submodule(self._model, name.rpartition(".")[0])

    def missing(self) -> list[str]:
        """Return the names of parameters that have not been read, sorted."""
        return sorted(name for name, parameter in self._model.named_parameters() if parameter in self._owners)


def _block_shape(shape: tuple[int, ...], offset: Offset) -> tuple[int, ...]:
    """Return the shape of a source as a block of a target with more dimensions: one expert of a stack."""
    return (1,) * (len(offset) - len(shape)) + shape


def _extract_from(full: Tensor) -> _Read:
    def read(local: Tensor, shard: Shard) -> None:
        local.copy_(shard.extract(full))

    return read


def _read_blocks(local: Tensor, shard: Shard, offsets: dict[str, Offset], files: WeightFiles) -> None:
    """Copy a shard of a target from the files, source by source.

    Args:
        local: of the shard's local shape.
        shard: which ranges of the full tensor are local.
        offsets: where each source lies in the full tensor.
        files: hold the sources.
    """
    if not shard.full_shape:  # a scalar has no dimension along which ranges could lie
        local.copy_(files.read(next(iter(offsets))))
        return
    for key, start in offsets.items():
        source = files.view(key)
        shape = _block_shape(tuple(source.get_shape()), start)
        for local_index, source_index in shard.overlaps(start, shape):
            block = source[source_index[len(shape) - len(source.get_shape()) :]]
            destination = local[local_index]
            destination.copy_(block.reshape(destination.shape))
