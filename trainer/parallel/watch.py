"""What a plan cannot prove by itself: that the gradients of whole weights are the same on all tensor ranks.

A weight that is left whole but used on cut activations gets another gradient on each rank. The loss does not show it;
the first backward pass does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.errors import PlanError, Problem
from trainer.parallel.collectives import Group, all_gather
from trainer.parallel.plan import Plan
from trainer.parallel.styles import starred

_DIFFERENCE = 0.02
"""Ranks may differ by so much of a gradient's norm: kernels that add in no fixed order do."""

_NOISE = 1e-3
"""Gradients smaller than this share of the largest are not compared: where the true one is zero, all is rounding."""


class GradientWatch:
    """Looks at one backward pass, and is gone."""

    def __init__(self, model: nn.Module, plan: Plan, group: Group) -> None:
        self._group = group
        self._seen: dict[str, Tensor] = {}
        self._handles = []
        for placement in plan.placements:
            owner, _, key = placement.name.rpartition(".")
            parameter = model.get_submodule(owner)._parameters[key]
            if placement.style.word == "replicate" and parameter is not None and parameter.requires_grad:
                hook = self._recorder(placement.name)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _recorder(self, name: str) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            wide = gradient.detach().double()
            self._seen[name] = torch.stack([wide.norm(), wide.sum()])

        return record

    def verify(self) -> None:
        """Compares what was seen; to be called on all ranks.

        Raises:
            PlanError: naming the weight whose gradients differ most.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._seen:
            return
        names = sorted(self._seen)
        table = all_gather(torch.stack([self._seen[name] for name in names]).unsqueeze(0), 0, self._group)
        self._seen.clear()
        norms = table[..., 0].amax(0)
        spread = (table.amax(0) - table.amin(0)).amax(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        spread = torch.where(norms > _NOISE * norms.max(), spread, 0)
        worst = int(spread.argmax())
        if float(spread[worst]) > _DIFFERENCE:
            raise PlanError(
                Problem(
                    f"parallel.tensor_plan.{starred(names[worst])}",
                    f"{names[worst]} is left whole by 'replicate', and its gradients on the tensor ranks differ by "
                    f"{100 * float(spread[worst]):.0f} % of their norm: it is used on cut activations",
                    "Give it 'replicated_with_grad_allreduce', or cut it",
                )
            )
