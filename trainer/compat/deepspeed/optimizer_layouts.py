"""Where DeepSpeed's optimizers keep the fp32 weights and the optimizer's state of each parameter on this rank.

Written against DeepSpeed 0.19, much of it private: `tests/test_checkpoint.py` saves and loads under every one of them
that needs no GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from trainer.errors import CheckpointError

_MOMENTUM = "momentum_buffer"
_NEGLIGIBLE = 1e-9
"""Less than what is left of 1 in fp32 when it is taken away from it."""


class FlatFragment(NamedTuple):
    """What this rank holds of a parameter: a stretch of its flattened elements, in a tensor that is stepped."""

    optimizer_tensor: Tensor
    """What torch's optimizer knows as a parameter: its state is found under it."""

    offset: int
    """Where the stretch begins in `optimizer_tensor`, flattened."""

    parameter_offset: int
    """Where it begins in the parameter, flattened."""

    length: int


class OptimizerLayout:
    """ZeRO 0 in fp32: the parameters themselves are stepped, and every data rank holds all of each."""

    is_replicated = True
    """Whether all data ranks hold the same."""

    has_master_weights = False
    """Whether there are fp32 master weights, from which every update writes the model's weights."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def torch_optimizer(self) -> Any:
        """torch's optimizer."""
        return self._optimizer

    @property
    def adam(self) -> Any:
        """The same; of Muon, the Adam that it steps everything but matrices with."""
        return getattr(self.torch_optimizer, "aux_optimizer", None) or self.torch_optimizer

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        """None where this rank holds nothing of it."""
        return FlatFragment(parameter, 0, 0, parameter.numel())

    def state(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[tuple[str, Tensor, int]]:
        """(kind, elements, where they begin in the flattened parameter) of the state that the optimizer keeps of each
        element; what several ranks have only on one of them if `owned_only`."""
        fragment = self.fragment(parameter)
        assert fragment is not None
        for kind, tensor in self.torch_optimizer.state.get(fragment.optimizer_tensor, {}).items():
            elements = self._elements(fragment.optimizer_tensor, tensor) if isinstance(tensor, Tensor) else None
            if elements is not None:
                yield kind, fragment_view(elements, fragment), fragment.parameter_offset

    def master_weights(self, fragment: FlatFragment) -> Tensor:
        """The fp32 elements of the parameter, flattened."""
        elements = self._elements(fragment.optimizer_tensor, fragment.optimizer_tensor)
        assert elements is not None
        return fragment_view(elements.detach(), fragment)

    def _elements(self, optimizer_tensor: Tensor, tensor: Tensor) -> Tensor | None:
        """The elements of `tensor`: `optimizer_tensor`, or its state. None for state of another shape."""
        return tensor if tensor.shape == optimizer_tensor.shape else None

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """All tensors that torch's optimizer steps."""
        yield from chain.from_iterable(group["params"] for group in self.torch_optimizer.param_groups)

    def allocate_optimizer_state(self) -> None:
        """Lets torch's optimizer make its state, where it has none; all its values are then to be replaced."""
        for group in self.torch_optimizer.param_groups:
            for tensor in group["params"]:
                if not self.torch_optimizer.state.get(tensor):
                    self._step_single(group, tensor)

    def _step_single(self, group: dict[str, Any], tensor: Tensor) -> None:
        """A step of a single tensor, whose gradient is zero."""
        kept, tensor.grad = tensor.grad, torch.zeros_like(tensor)
        groups, self.torch_optimizer.param_groups = self.torch_optimizer.param_groups, [{**group, "params": [tensor]}]
        self.torch_optimizer.step()
        self.torch_optimizer.param_groups, tensor.grad = groups, kept

    def _allocate_flat_state(self, group: dict[str, Any], flat: Tensor) -> None:
        """Makes the state of a flat tensor as the optimizer makes that of a single number: in no more memory."""
        if self.torch_optimizer.state.get(flat):
            return
        number = nn.Parameter(flat.detach().new_zeros(1))
        self._step_single(group, number)
        made = self.torch_optimizer.state.pop(number, {})
        self.torch_optimizer.state[flat] = {
            key: torch.full_like(flat, value.item(), dtype=value.dtype, requires_grad=False)
            if isinstance(value, Tensor) and value.ndim
            else copy.deepcopy(value)
            for key, value in made.items()
        }

    @torch.no_grad()
    def restore_bias_correction(self, steps: int) -> None:
        """Lets DeepSpeed's Adam for CPUs count the steps that were taken before.

        It keeps the powers of its betas as products that grow by a factor a step, in fp32, outside of what Python sees.
        After a jump it computes them otherwise, and the next update would differ in its last bit. So it takes the steps
        once more, on a single number; where the powers are next to nothing, nothing depends on them any more.
        """
        adam = self.adam
        on_cpu = isinstance(adam, DeepSpeedCPUAdam) or (
            isinstance(adam, FusedAdam) and all(tensor.device.type == "cpu" for tensor in self.optimizer_tensors())
        )
        # Groups differ in their decay alone, and one counter serves them all.
        group = adam.param_groups[0]
        if not on_cpu or max(group["betas"]) ** steps < _NEGLIGIBLE:
            return
        number = nn.Parameter(torch.zeros(1))
        number.grad = torch.zeros(1)
        groups, adam.param_groups = adam.param_groups, [{**group, "params": [number]}]
        for _ in range(steps):
            adam.step()
        adam.param_groups = groups
        adam.state.pop(number, None)

    def sync_model_weights(self) -> None:
        """Gives the weights that the model computes with the values of the fp32 ones. On all ranks."""


class _HalfPrecisionLayout(OptimizerLayout):
    """ZeRO 0 in half precision: fp32 copies beside the weights, one flat tensor a group (fused) or one each."""

    has_master_weights = True

    @property
    def torch_optimizer(self) -> Any:
        return self._optimizer.optimizer

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._fragments: dict[int, FlatFragment] = {}
        for number, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for place, parameter in enumerate(group):
                if isinstance(optimizer, FP16_Optimizer):
                    flat, start = optimizer.fp32_groups_flat[number], offset
                else:
                    flat, start = optimizer.fp32_groups[number][place], 0
                self._fragments[id(parameter)] = FlatFragment(flat, start, 0, parameter.numel())
                offset += parameter.numel()

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        return self._fragments.get(id(parameter))

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        for parameter in chain.from_iterable(self._optimizer.fp16_groups):
            fragment = self._fragments[id(parameter)]
            master = fragment.optimizer_tensor.view(-1)[fragment.offset : fragment.offset + fragment.length]
            parameter.copy_(master.view(parameter.shape))


class _Zero12Layout(OptimizerLayout):
    """ZeRO 1 and 2, also with offload, and BF16_Optimizer: one flat tensor a group, of which each rank has a part."""

    is_replicated, has_master_weights = False, True

    @property
    def torch_optimizer(self) -> Any:
        return self._optimizer.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        if isinstance(self._optimizer, BF16_Optimizer):
            return list(self._optimizer.fp32_groups_flat_partition)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._flat_partitions()[mapping.param_group_index]
        here = mapping.hp_fragment_address
        return FlatFragment(flat, int(here.start), int(mapping.lp_fragment_address.start), int(here.numel))

    def state(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[tuple[str, Tensor, int]]:
        momentum, fragment = self._muon_momentum(parameter), self.fragment(parameter)
        for kind, tensor, parameter_offset in super().state(parameter, owned_only=owned_only):
            if momentum is None or kind != _MOMENTUM:
                yield kind, tensor, parameter_offset
        if momentum is not None:
            assert fragment is not None
            begin, end = (
                (fragment.parameter_offset, fragment.parameter_offset + fragment.length)
                if owned_only
                else (0, parameter.numel())
            )
            yield _MOMENTUM, momentum[begin:end], begin

    def _muon_momentum(self, parameter: nn.Parameter) -> Tensor | None:
        """Muon's momentum without offload: of all of each parameter of which this rank steps a part, one behind the
        other in one tensor."""
        fragment = self.fragment(parameter)
        if fragment is None or not self._has_muon_momentum(parameter):
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

    def _has_muon_momentum(self, parameter: nn.Parameter) -> bool:
        return (
            getattr(parameter, "use_muon", False)
            and isinstance(self._optimizer, DeepSpeedZeroOptimizer)
            and not self._optimizer.cpu_offload
        )

    def optimizer_tensors(self) -> Iterator[Tensor]:
        yield from self._flat_partitions()

    def allocate_optimizer_state(self) -> None:
        for number, (group, flat) in enumerate(
            zip(self.torch_optimizer.param_groups, self._flat_partitions(), strict=True)
        ):
            self._allocate_flat_state(group, flat)
            if group.get("use_muon"):
                self._allocate_muon_momentum(number, flat)
        self._optimizer._hp_optimizer_states_linked = False

    def _allocate_muon_momentum(self, number: int, flat: Tensor) -> None:
        """Muon makes it in its first step. Ranks must agree on whether they have it, where they gather it."""
        parameters = getattr(self._optimizer, "params_in_partition", [()] * (number + 1))[number]
        elements = flat.numel()
        if parameters and self._has_muon_momentum(parameters[0]):
            elements = sum(parameter.numel() for parameter in parameters)
        self.torch_optimizer.state[flat].setdefault(_MOMENTUM, flat.detach().new_zeros(elements))

    def sync_model_weights(self) -> None:
        self._optimizer.update_lp_params()


class _Zero3Layout(OptimizerLayout):
    """ZeRO 3: flat tensors of parts of parameters."""

    is_replicated, has_master_weights = False, True

    @property
    def torch_optimizer(self) -> Any:
        return self._optimizer.optimizer

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        optimizer = self._optimizer
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        parameter_offset = optimizer._get_param_partition_rank(parameter) * length
        count = min(length, int(parameter.ds_numel) - parameter_offset)  # type: ignore[attr-defined]
        if count <= 0:
            return None
        return FlatFragment(
            optimizer.fp32_partitioned_groups_flat[group], int(offset), int(parameter_offset), int(count)
        )

    def optimizer_tensors(self) -> Iterator[Tensor]:
        yield from self._optimizer.fp32_partitioned_groups_flat

    def _elements(self, optimizer_tensor: Tensor, tensor: Tensor) -> Tensor | None:
        """Also in files on NVMe: those are mapped into memory, so that no more of them is there than is in use."""
        swap_record = self._swap_record(optimizer_tensor)
        if swap_record is None:
            return super()._elements(optimizer_tensor, tensor)
        for place in swap_record.tensors:
            if place.compute_tensor is tensor:
                return _map_file(Path(place.swap_path), swap_record.numel(), swap_record.dtype())
        return tensor if tensor.numel() == swap_record.numel() else None

    def _swap_record(self, flat: Tensor) -> Any:
        """DeepSpeed's record of where on NVMe a flat tensor and its state are; None if they are in memory."""
        swapper = self._optimizer.optimizer_swapper
        return None if swapper is None else swapper.swap_params_info.get(flat.ds_id)  # type: ignore[attr-defined]

    def allocate_optimizer_state(self) -> None:
        groups = self._optimizer.sub_group_to_group_id
        for number, flat in enumerate(self.optimizer_tensors()):
            if self.torch_optimizer.state.get(flat):
                continue
            with self._swapped_in(number, flat, changed=True):
                self._allocate_flat_state(self.torch_optimizer.param_groups[groups[number]], flat)

    @contextmanager
    def _swapped_in(self, number: int, flat: Tensor, *, changed: bool) -> Iterator[None]:
        """Meanwhile a sub-group that is on NVMe is in memory."""
        swap_record = self._swap_record(flat)
        if swap_record is not None:
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swap_record is not None and changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(number)
        elif swap_record is not None:
            self._optimizer._release_swap_buffers(number)

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for number, flat in enumerate(self.optimizer_tensors()):
            with self._swapped_in(number, flat, changed=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _map_file(path: Path, numbers: int, dtype: torch.dtype) -> Tensor:
    """A file's elements; what is written into them is written into the file.

    Raises:
        CheckpointError: if it is too short: DeepSpeed does not notice a full disk.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < numbers * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {size} bytes of {numbers * dtype.itemsize} were written; is the disk of nvme_path full?"
        )
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype)


def fragment_view(tensor: Tensor, fragment: FlatFragment) -> Tensor:
    """The elements in a tensor as large as `held.stepped` that belong to the parameter."""
    return tensor.view(-1)[fragment.offset : fragment.offset + fragment.length]


def layout_of(optimizer: Any) -> OptimizerLayout:
    """How one of DeepSpeed's optimizers holds its state."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Zero3Layout(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return _Zero12Layout(optimizer)
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return _HalfPrecisionLayout(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    return OptimizerLayout(optimizer)
