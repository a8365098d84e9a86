"""Where DeepSpeed's optimizers keep the fp32 weights and the optimizer's state of each parameter on this rank.

Written against DeepSpeed 0.19, much of it private: `tests/test_checkpoint.py` saves and loads under every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


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

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def inner(self) -> Any:
        """torch's optimizer."""
        return self._optimizer

    def held(self, parameter: nn.Parameter) -> Held | None:
        """None where this rank holds nothing of it."""
        return Held(parameter, 0, 0, parameter.numel())

    def stepped(self) -> Iterator[Tensor]:
        """All tensors that torch's optimizer steps."""
        yield from chain.from_iterable(group["params"] for group in self.inner.param_groups)

    def allocate(self) -> None:
        """Lets torch's optimizer make its state, by a step without gradients; all values are then to be replaced."""
        stepped = list(self.stepped())
        for tensor in stepped:
            tensor.grad = torch.zeros_like(tensor)
        self.inner.step()
        for tensor in stepped:
            tensor.grad = None

    def publish(self) -> None:
        """Gives the weights that the model computes with the values of the fp32 ones. On all ranks."""


class _Halves(Holding):
    """ZeRO 0 in half precision: fp32 copies beside the weights, one flat tensor a group (fused) or one each."""

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

    is_replicated = False

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

    def stepped(self) -> Iterator[Tensor]:
        yield from self._flats()

    def allocate(self) -> None:
        kept = [flat.grad for flat in self._flats()]
        super().allocate()
        for flat, gradient in zip(self._flats(), kept, strict=True):
            flat.grad = gradient  # with offload and in bf16 it is a buffer that is made once
        self._optimizer._hp_optimizer_states_linked = False

    def publish(self) -> None:
        self._optimizer.update_lp_params()


class _SubGroups(Holding):
    """ZeRO 3: flat tensors of parts of parameters."""

    is_replicated = False

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

    def allocate(self) -> None:
        for number, flat in enumerate(self.stepped()):
            kept, flat.grad = flat.grad, torch.zeros_like(flat)
            self._optimizer._optimizer_step(number)
            flat.grad = kept

    @torch.no_grad()
    def publish(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for number, flat in enumerate(self.stepped()):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


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
