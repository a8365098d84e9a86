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
_NOTHING = 1e-9
"""Less than what is left of 1 in fp32 when it is taken away from it."""


class Held(NamedTuple):
    """What this rank holds of a parameter: a stretch of its flattened elements, in a tensor that is stepped."""

    stepped: Tensor
    """What torch's optimizer knows as a parameter: its state is found under it."""

    at: int
    """Where the stretch begins in `stepped`, flattened."""

    first: int
    """Where it begins in the parameter, flattened."""

    length: int


class Holding:
    """ZeRO 0 in fp32: the parameters themselves are stepped, and every data rank holds all of each."""

    is_replicated = True
    """Whether all data ranks hold the same."""

    has_master_weights = False
    """Whether there are fp32 master weights, from which every update writes the model's weights."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def inner(self) -> Any:
        """torch's optimizer."""
        return self._optimizer

    @property
    def adam(self) -> Any:
        """The same; of Muon, the Adam that it steps everything but matrices with."""
        return getattr(self.inner, "aux_optimizer", None) or self.inner

    def held(self, parameter: nn.Parameter) -> Held | None:
        """None where this rank holds nothing of it."""
        return Held(parameter, 0, 0, parameter.numel())

    def state(self, parameter: nn.Parameter, *, owned: bool) -> Iterator[tuple[str, Tensor, int]]:
        """(kind, elements, where they begin in the flattened parameter) of the state that the optimizer keeps of each
        element; what several ranks have only on one of them if `owned`."""
        held = self.held(parameter)
        assert held is not None
        for kind, tensor in self.inner.state.get(held.stepped, {}).items():
            elements = self._elements(held.stepped, tensor) if isinstance(tensor, Tensor) else None
            if elements is not None:
                yield kind, stretch(elements, held), held.first

    def weights(self, held: Held) -> Tensor:
        """The fp32 elements of the parameter, flattened."""
        elements = self._elements(held.stepped, held.stepped)
        assert elements is not None
        return stretch(elements.detach(), held)

    def _elements(self, stepped: Tensor, tensor: Tensor) -> Tensor | None:
        """Where the elements of `tensor` are: of `stepped`, or of its state. None for state of another shape."""
        return tensor if tensor.shape == stepped.shape else None

    def stepped(self) -> Iterator[Tensor]:
        """All tensors that torch's optimizer steps."""
        yield from chain.from_iterable(group["params"] for group in self.inner.param_groups)

    def allocate(self) -> None:
        """Lets torch's optimizer make its state, where it has none; all its values are then to be replaced."""
        for group in self.inner.param_groups:
            for tensor in group["params"]:
                if not self.inner.state.get(tensor):
                    self._step_alone(group, tensor)

    def _step_alone(self, group: dict[str, Any], tensor: Tensor) -> None:
        """A step of a single tensor, whose gradient is zero."""
        kept, tensor.grad = tensor.grad, torch.zeros_like(tensor)
        groups, self.inner.param_groups = self.inner.param_groups, [{**group, "params": [tensor]}]
        self.inner.step()
        self.inner.param_groups, tensor.grad = groups, kept

    def _allocate_flat(self, group: dict[str, Any], flat: Tensor) -> None:
        """Makes the state of a flat tensor as the optimizer makes that of a single number: in no more memory."""
        if self.inner.state.get(flat):
            return
        number = nn.Parameter(flat.detach().new_zeros(1))
        self._step_alone(group, number)
        made = self.inner.state.pop(number, {})
        self.inner.state[flat] = {
            key: torch.full_like(flat, value.item(), dtype=value.dtype, requires_grad=False)
            if isinstance(value, Tensor) and value.ndim
            else copy.deepcopy(value)
            for key, value in made.items()
        }

    @torch.no_grad()
    def recall_steps(self, steps: int) -> None:
        """Lets DeepSpeed's Adam for CPUs count the steps that were taken before.

        It keeps the powers of its betas as products that grow by a factor a step, in fp32, outside of what Python sees.
        After a jump it computes them otherwise, and the next update would differ in its last bit. So it takes the steps
        once more, on a single number; where the powers are next to nothing, nothing depends on them any more.
        """
        adam = self.adam
        on_cpu = isinstance(adam, DeepSpeedCPUAdam) or (
            isinstance(adam, FusedAdam) and all(tensor.device.type == "cpu" for tensor in self.stepped())
        )
        # Groups differ in their decay alone, and one counter serves them all.
        group = adam.param_groups[0]
        if not on_cpu or max(group["betas"]) ** steps < _NOTHING:
            return
        number = nn.Parameter(torch.zeros(1))
        number.grad = torch.zeros(1)
        groups, adam.param_groups = adam.param_groups, [{**group, "params": [number]}]
        for _ in range(steps):
            adam.step()
        adam.param_groups = groups
        adam.state.pop(number, None)

    def publish(self) -> None:
        """Gives the weights that the model computes with the values of the fp32 ones. On all ranks."""


class _Halves(Holding):
    """ZeRO 0 in half precision: fp32 copies beside the weights, one flat tensor a group (fused) or one each."""

    has_master_weights = True

    @property
    def inner(self) -> Any:
        return self._optimizer.optimizer

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._held: dict[int, Held] = {}
        for number, group in enumerate(optimizer.fp16_groups):
            at = 0
            for place, parameter in enumerate(group):
                if isinstance(optimizer, FP16_Optimizer):
                    flat, start = optimizer.fp32_groups_flat[number], at
                else:
                    flat, start = optimizer.fp32_groups[number][place], 0
                self._held[id(parameter)] = Held(flat, start, 0, parameter.numel())
                at += parameter.numel()

    def held(self, parameter: nn.Parameter) -> Held | None:
        return self._held.get(id(parameter))

    @torch.no_grad()
    def publish(self) -> None:
        for parameter in chain.from_iterable(self._optimizer.fp16_groups):
            held = self._held[id(parameter)]
            master = held.stepped.view(-1)[held.at : held.at + held.length]
            parameter.copy_(master.view(parameter.shape))


class _Partitions(Holding):
    """ZeRO 1 and 2, also with offload, and BF16_Optimizer: one flat tensor a group, of which each rank has a part."""

    is_replicated, has_master_weights = False, True

    @property
    def inner(self) -> Any:
        return self._optimizer.optimizer

    def _flats(self) -> list[Tensor]:
        if isinstance(self._optimizer, BF16_Optimizer):
            return list(self._optimizer.fp32_groups_flat_partition)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def held(self, parameter: nn.Parameter) -> Held | None:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._flats()[mapping.param_group_index]
        here = mapping.hp_fragment_address
        return Held(flat, int(here.start), int(mapping.lp_fragment_address.start), int(here.numel))

    def state(self, parameter: nn.Parameter, *, owned: bool) -> Iterator[tuple[str, Tensor, int]]:
        momentum, held = self._muon_momentum(parameter), self.held(parameter)
        for kind, tensor, first in super().state(parameter, owned=owned):
            if momentum is None or kind != _MOMENTUM:
                yield kind, tensor, first
        if momentum is not None:
            assert held is not None
            begin, end = (held.first, held.first + held.length) if owned else (0, parameter.numel())
            yield _MOMENTUM, momentum[begin:end], begin

    def _muon_momentum(self, parameter: nn.Parameter) -> Tensor | None:
        """Muon's momentum without offload: of all of each parameter of which this rank steps a part, one behind the
        other in one tensor."""
        held = self.held(parameter)
        if held is None or not self._has_muon_momentum(parameter):
            return None
        buffer: Tensor | None = self.inner.state.get(held.stepped, {}).get(_MOMENTUM)
        if buffer is None:
            return None
        at = 0
        for other in self._optimizer.params_in_partition[parameter._hp_mapping.param_group_index]:  # type: ignore[attr-defined]
            if other is parameter:
                break
            at += other.numel()
        return buffer[at : at + parameter.numel()]

    def _has_muon_momentum(self, parameter: nn.Parameter) -> bool:
        return (
            getattr(parameter, "use_muon", False)
            and isinstance(self._optimizer, DeepSpeedZeroOptimizer)
            and not self._optimizer.cpu_offload
        )

    def stepped(self) -> Iterator[Tensor]:
        yield from self._flats()

    def allocate(self) -> None:
        for number, (group, flat) in enumerate(zip(self.inner.param_groups, self._flats(), strict=True)):
            self._allocate_flat(group, flat)
            if group.get("use_muon"):
                self._allocate_muon_momentum(number, flat)
        self._optimizer._hp_optimizer_states_linked = False

    def _allocate_muon_momentum(self, number: int, flat: Tensor) -> None:
        """Muon makes it in its first step. Ranks must agree on whether they have it, where they gather it."""
        parameters = getattr(self._optimizer, "params_in_partition", [()] * (number + 1))[number]
        elements = flat.numel()
        if parameters and self._has_muon_momentum(parameters[0]):
            elements = sum(parameter.numel() for parameter in parameters)
        self.inner.state[flat].setdefault(_MOMENTUM, flat.detach().new_zeros(elements))

    def publish(self) -> None:
        self._optimizer.update_lp_params()


class _SubGroups(Holding):
    """ZeRO 3: flat tensors of parts of parameters."""

    is_replicated, has_master_weights = False, True

    @property
    def inner(self) -> Any:
        return self._optimizer.optimizer

    def held(self, parameter: nn.Parameter) -> Held | None:
        optimizer = self._optimizer
        group, at, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = optimizer._get_param_partition_rank(parameter) * length
        count = min(length, int(parameter.ds_numel) - first)  # type: ignore[attr-defined]
        if count <= 0:
            return None
        return Held(optimizer.fp32_partitioned_groups_flat[group], int(at), int(first), int(count))

    def stepped(self) -> Iterator[Tensor]:
        yield from self._optimizer.fp32_partitioned_groups_flat

    def _elements(self, stepped: Tensor, tensor: Tensor) -> Tensor | None:
        """Also in files on NVMe: those are mapped into memory, so that no more of them is there than is in use."""
        swapped = self._swapped(stepped)
        if swapped is None:
            return super()._elements(stepped, tensor)
        for place in swapped.tensors:
            if place.compute_tensor is tensor:
                return _mapped(Path(place.swap_path), swapped.numel(), swapped.dtype())
        return tensor if tensor.numel() == swapped.numel() else None

    def _swapped(self, flat: Tensor) -> Any:
        """DeepSpeed's record of where on NVMe a flat tensor and its state are; None if they are in memory."""
        swapper = self._optimizer.optimizer_swapper
        return None if swapper is None else swapper.swap_params_info.get(flat.ds_id)  # type: ignore[attr-defined]

    def allocate(self) -> None:
        groups = self._optimizer.sub_group_to_group_id
        for number, flat in enumerate(self.stepped()):
            if self.inner.state.get(flat):
                continue
            with self._in_memory(number, flat, changed=True):
                self._allocate_flat(self.inner.param_groups[groups[number]], flat)

    @contextmanager
    def _in_memory(self, number: int, flat: Tensor, *, changed: bool) -> Iterator[None]:
        """Meanwhile a sub-group that is on NVMe is in memory."""
        swapped = self._swapped(flat)
        if swapped is not None:
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped is not None and changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(number)
        elif swapped is not None:
            self._optimizer._release_swap_buffers(number)

    @torch.no_grad()
    def publish(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for number, flat in enumerate(self.stepped()):
            with self._in_memory(number, flat, changed=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _mapped(path: Path, numbers: int, dtype: torch.dtype) -> Tensor:
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


def stretch(tensor: Tensor, held: Held) -> Tensor:
    """The elements in a tensor as large as `held.stepped` that belong to the parameter."""
    return tensor.view(-1)[held.at : held.at + held.length]


def holding_of(optimizer: Any) -> Holding:
    """How one of DeepSpeed's optimizers holds its state."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _SubGroups(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return _Partitions(optimizer)
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return _Halves(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    return Holding(optimizer)
