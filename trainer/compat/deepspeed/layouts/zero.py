"""Layouts of master weights and optimizer state under ZeRO 1, 2 and 3, and of BF16_Optimizer.

DeepSpeed's public `safe_get_local_*` of ZeRO 3 return copies on the device, padding included, and read a whole
sub-group from NVMe for each parameter. A checkpoint needs live views without padding, so these classes look into the
flat buffers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.fragments import FlatFragment, StateFragment
from trainer.compat.deepspeed.internals import BF16_Optimizer, DeepSpeedZeroOptimizer
from trainer.compat.deepspeed.layouts.base import OptimizerLayout
from trainer.errors import CheckpointError

_MOMENTUM = "momentum_buffer"


class _PartitionedLayout(OptimizerLayout):
    """Each data rank steps its partition of fp32 master weights."""

    is_replicated, has_master_weights = False, True

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """See `OptimizerLayout.torch_optimizer`."""
        wrapped: torch.optim.Optimizer = self._optimizer.optimizer
        return wrapped


class Zero12Layout(_PartitionedLayout):
    """ZeRO 1 and 2, with and without offload, and BF16_Optimizer: each rank has a partition per group."""

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """See `OptimizerLayout.optimizer_tensors`."""
        if isinstance(self._optimizer, BF16_Optimizer):
            yield from self._optimizer.fp32_groups_flat_partition
        else:
            yield from self._optimizer.single_partition_of_fp32_groups

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        """See `OptimizerLayout.fragment`."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = list(self.optimizer_tensors())[mapping.param_group_index]
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return FlatFragment(flat, int(high.start), int(low.start), int(high.numel))

    def state_fragments(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[StateFragment]:
        """See `OptimizerLayout.state_fragments`."""
        momentum = self._full_muon_momentum(parameter)
        for fragment in super().state_fragments(parameter, owned_only=owned_only):
            if momentum is None or fragment.key != _MOMENTUM:
                yield fragment
        if momentum is None:
            return
        start, end = 0, parameter.numel()
        if owned_only:
            stepped = self.fragment(parameter)
            assert stepped is not None
            start, end = stepped.parameter_offset, stepped.parameter_offset + stepped.length
        yield StateFragment(_MOMENTUM, momentum[start:end], start)

    def _full_muon_momentum(self, parameter: nn.Parameter) -> Tensor | None:
        """Muon's momentum (parameter.numel(),) where it is kept in full.

        Muon orthogonalizes full matrices. Without offload, a rank therefore keeps the full momentum of every parameter
        of which it steps a fragment, concatenated in one tensor per group.
        """
        fragment = self.fragment(parameter)
        if fragment is None or not self._has_full_muon_momentum(parameter):
            return None
        buffer: Tensor | None = self.torch_optimizer.state.get(fragment.optimizer_tensor, {}).get(_MOMENTUM)
        if buffer is None:
            return None
        offset = 0
        for other in self._optimizer.params_in_partition[parameter._hp_mapping.param_group_index]:  # type: ignore[attr-defined]
            if other is parameter:
                break
            offset += other.numel()
        return buffer[offset : offset + parameter.numel()]

    def _has_full_muon_momentum(self, parameter: nn.Parameter) -> bool:
        return (
            getattr(parameter, "use_muon", False)
            and isinstance(self._optimizer, DeepSpeedZeroOptimizer)
            and not self._optimizer.cpu_offload
        )

    def allocate_optimizer_state(self) -> None:
        """See `OptimizerLayout.allocate_optimizer_state`."""
        groups = zip(self.torch_optimizer.param_groups, self.optimizer_tensors(), strict=True)
        for index, (group, flat) in enumerate(groups):
            self._allocate_flat_state(group, flat)
            if group.get("use_muon"):
                self._allocate_muon_momentum(index, flat)
        self._optimizer._hp_optimizer_states_linked = False

    def _allocate_muon_momentum(self, group_index: int, flat: Tensor) -> None:
        """Create Muon's momentum, which Muon itself creates in its first step.

        Ranks gather the momentum of a matrix, so all of them must have it or none.
        """
        partitions = getattr(self._optimizer, "params_in_partition", None)
        parameters = () if partitions is None else partitions[group_index]
        numel = flat.numel()
        if parameters and self._has_full_muon_momentum(parameters[0]):
            numel = sum(parameter.numel() for parameter in parameters)
        self.torch_optimizer.state[flat].setdefault(_MOMENTUM, flat.detach().new_zeros(numel))

    def sync_model_weights(self) -> None:
        """See `OptimizerLayout.sync_model_weights`. Collective: all data ranks must call it."""
        self._optimizer.update_lp_params()


class Zero3Layout(_PartitionedLayout):
    """ZeRO 3: each rank has a partition of every parameter, in flat tensors of sub-groups, possibly on NVMe."""

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """See `OptimizerLayout.optimizer_tensors`."""
        yield from self._optimizer.fp32_partitioned_groups_flat

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        """See `OptimizerLayout.fragment`."""
        optimizer = self._optimizer
        sub_group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        parameter_offset = dist.get_rank(parameter.ds_process_group) * length  # type: ignore[attr-defined]
        count = min(length, int(parameter.ds_numel) - parameter_offset)  # type: ignore[attr-defined]
        if count <= 0:  # the partition is padding
            return None
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        return FlatFragment(flat, int(offset), int(parameter_offset), int(count))

    def _elements(self, optimizer_tensor: Tensor, value: Tensor) -> Tensor | None:
        """As the base class; files on NVMe are mapped, so only the pages in use take memory."""
        swap_info = self._swap_info(optimizer_tensor)
        if swap_info is None:
            return super()._elements(optimizer_tensor, value)
        for swapped in swap_info.tensors:
            if swapped.compute_tensor is value:
                return map_file(Path(swapped.swap_path), swap_info.numel(), swap_info.dtype())
        return value if value.numel() == swap_info.numel() else None

    def _swap_info(self, flat: Tensor) -> Any:
        """DeepSpeed's record of the files of a flat tensor and its state; None if they are in memory."""
        swapper = self._optimizer.optimizer_swapper
        return None if swapper is None else swapper.swap_params_info.get(flat.ds_id)  # type: ignore[attr-defined]

    def allocate_optimizer_state(self) -> None:
        """See `OptimizerLayout.allocate_optimizer_state`."""
        group_of = self._optimizer.sub_group_to_group_id
        for sub_group, flat in enumerate(self.optimizer_tensors()):
            if self.torch_optimizer.state.get(flat):
                continue
            with self._swapped_in(sub_group, flat, changed=True):
                self._allocate_flat_state(self.torch_optimizer.param_groups[group_of[sub_group]], flat)

    @contextmanager
    def _swapped_in(self, sub_group: int, flat: Tensor, *, changed: bool) -> Iterator[None]:
        """Hold a sub-group in memory that may be on NVMe, and write it back if it is `changed`."""
        is_on_nvme = self._swap_info(flat) is not None
        if is_on_nvme:
            self._optimizer._optimizer_states_and_gradient_swap_in(sub_group)
        yield
        if is_on_nvme and changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(sub_group)
        elif is_on_nvme:
            self._optimizer._release_swap_buffers(sub_group)

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """See `OptimizerLayout.sync_model_weights`. Collective: all data ranks must call it."""
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for sub_group, flat in enumerate(self.optimizer_tensors()):
            with self._swapped_in(sub_group, flat, changed=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()


def map_file(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """Map a file of at least `numel` elements as a tensor (numel,); writes reach the file.

    Raises:
        CheckpointError: if the file is too short: DeepSpeed does not notice a full disk.
    """
    expected, size = numel * dtype.itemsize, path.stat().st_size if path.exists() else 0
    if size < expected:
        raise CheckpointError(f"{path}: {size} bytes of {expected} were written. Free space on the disk of nvme_path")
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
