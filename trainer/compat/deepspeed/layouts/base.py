"""Layout of master weights and optimizer state without ZeRO: in fp32, and in half precision with fp32 copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.deepspeed.fragments import FlatFragment, StateFragment
from trainer.compat.deepspeed.internals import (
    DeepSpeedCPUAdam,
    FP16_Optimizer,
    FP16_UnfusedOptimizer,
    FusedAdam,
    FusedLion,
)

_NEGLIGIBLE = 1e-9
"""Far below half an ulp of 1.0 in fp32: 1 - beta**step rounds to 1."""


class OptimizerLayout:
    """ZeRO 0 in fp32: the optimizer steps the parameters themselves, and every data rank holds all of each."""

    is_replicated = True
    """Whether all data ranks hold the same fragments."""

    has_master_weights = False
    """Whether there are fp32 master weights, from which every update writes the model weights."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of torch's interface that DeepSpeed's wraps."""
        wrapped: torch.optim.Optimizer = self._optimizer
        return wrapped

    @property
    def adam(self) -> torch.optim.Optimizer:
        """`torch_optimizer`; for Muon, the Adam that steps everything but matrices."""
        return getattr(self.torch_optimizer, "aux_optimizer", None) or self.torch_optimizer

    @property
    def counts_steps_per_group(self) -> bool:
        """Whether one parameter of a group has the step count of them all."""
        return isinstance(self.adam, FusedAdam | FusedLion)

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        """Find this rank's fragment of a parameter; None if it has none."""
        return FlatFragment(parameter, 0, 0, parameter.numel())

    def state_fragments(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[StateFragment]:
        """Yield the elementwise optimizer state of a parameter on this rank.

        Args:
            parameter: of which this rank has a fragment.
            owned_only: yield what several ranks hold on one of them only.
        """
        fragment = self.fragment(parameter)
        assert fragment is not None
        for key, value in self.torch_optimizer.state.get(fragment.optimizer_tensor, {}).items():
            elements = self._elements(fragment.optimizer_tensor, value) if isinstance(value, Tensor) else None
            if elements is not None:
                yield StateFragment(key, fragment.view(elements), fragment.parameter_offset)

    def master_weights(self, fragment: FlatFragment) -> Tensor:
        """View the fp32 values (`fragment.length`,) of the parameter's elements, live."""
        elements = self._elements(fragment.optimizer_tensor, fragment.optimizer_tensor)
        assert elements is not None
        return fragment.view(elements.detach())

    def _elements(self, optimizer_tensor: Tensor, value: Tensor) -> Tensor | None:
        """Access the memory of a tensor or of its elementwise state; None for state of another shape."""
        return value if value.shape == optimizer_tensor.shape else None

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that torch's optimizer steps."""
        yield from chain.from_iterable(group["params"] for group in self.torch_optimizer.param_groups)

    def allocate_optimizer_state(self) -> None:
        """Create the optimizer state where there is none, with values that are to be overwritten."""
        for group in self.torch_optimizer.param_groups:
            for tensor in group["params"]:
                if not self.torch_optimizer.state.get(tensor):
                    _step_single(self.torch_optimizer, group, tensor)

    def _allocate_flat_state(self, group: dict[str, Any], flat: Tensor) -> None:
        """Create the state of a flat tensor in the form that the optimizer gives to a probe of one element.

        A step on the flat tensor itself would need its gradient, and temporaries of the same size.
        """
        state = self.torch_optimizer.state
        if state.get(flat):
            return
        probe = nn.Parameter(flat.detach().new_zeros(1))
        _step_single(self.torch_optimizer, group, probe)
        probe_state = state.pop(probe, {})
        state[flat] = {
            key: torch.full_like(flat, value.item(), dtype=value.dtype, requires_grad=False)
            if isinstance(value, Tensor) and value.ndim
            else copy.deepcopy(value)
            for key, value in probe_state.items()
        }

    @torch.no_grad()
    def restore_bias_correction(self, steps: int) -> None:
        """Replay the step count that DeepSpeed's CPU Adam keeps in C++.

        CPU Adam updates the powers of its betas by one factor per step, in fp32. When the count jumps it computes them
        with `pow` instead, and the next update differs in its last bit. So the steps are repeated on a probe of one
        element, unless the powers are negligible.
        """
        adam = self.adam
        is_on_cpu = isinstance(adam, DeepSpeedCPUAdam) or (
            isinstance(adam, FusedAdam) and all(tensor.device.type == "cpu" for tensor in self.optimizer_tensors())
        )
        group = adam.param_groups[0]  # groups differ in their weight decay only, and share one count
        if not is_on_cpu or max(group["betas"]) ** steps < _NEGLIGIBLE:
            return
        probe = nn.Parameter(torch.zeros(1))
        probe.grad = torch.zeros(1)
        groups, adam.param_groups = adam.param_groups, [{**group, "params": [probe]}]
        for _ in range(steps):
            adam.step()
        adam.param_groups = groups
        adam.state.pop(probe, None)

    def sync_model_weights(self) -> None:
        """Copy the master weights into the model weights. Collective: all data ranks must call it."""


def _step_single(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: Tensor) -> None:
    """Step a single tensor with a gradient of zero."""
    gradient, tensor.grad = tensor.grad, torch.zeros_like(tensor)
    groups, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [tensor]}]
    optimizer.step()
    optimizer.param_groups, tensor.grad = groups, gradient


class HalfPrecisionLayout(OptimizerLayout):
    """ZeRO 0 in half precision: fp32 copies of the weights, one flat tensor per group (fused) or one per parameter."""

    has_master_weights = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._fragments: dict[int, FlatFragment] = {}
        for group_index, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for index, parameter in enumerate(group):
                if isinstance(optimizer, FP16_Optimizer):
                    master, start = optimizer.fp32_groups_flat[group_index], offset
                else:
                    master, start = optimizer.fp32_groups[group_index][index], 0
                self._fragments[id(parameter)] = FlatFragment(master, start, 0, parameter.numel())
                offset += parameter.numel()

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """See `OptimizerLayout.torch_optimizer`."""
        wrapped: torch.optim.Optimizer = self._optimizer.optimizer
        return wrapped

    def fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        """See `OptimizerLayout.fragment`."""
        return self._fragments.get(id(parameter))

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """See `OptimizerLayout.sync_model_weights`."""
        for parameter in chain.from_iterable(self._optimizer.fp16_groups):
            fragment = self._fragments[id(parameter)]
            parameter.copy_(fragment.view(fragment.optimizer_tensor).view(parameter.shape))


def undo_initial_step(optimizer: Any) -> None:
    """Undo the step without gradients with which DeepSpeed 0.19 initializes its optimizers of `HalfPrecisionLayout`.

    Adam's bias correction counts it, which makes the first real update a quarter too small, and it decays the weights
    once too often.
    """
    if isinstance(optimizer, FP16_Optimizer):
        pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat, strict=True)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(chain(*optimizer.fp32_groups), chain(*optimizer.fp16_groups), strict=True)
    else:
        return
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for master, weights in pairs:
            master.copy_(weights)
