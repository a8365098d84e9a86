"""What a plan cannot prove by itself: that ranks that hold the same weight get the same gradient for it.

A weight that is replicated but used on sharded activations gets another gradient on each rank, and so does a key/value
head that several ranks share, unless their gradients are summed. The loss does not show it; the first backward pass
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed.collectives import Group, all_gather
from trainer.errors import PlanError, Problem
from trainer.sharding import wildcard_name
from trainer.tensor_parallel.plan import Plan, PlanEntry

_DIFFERENCE = 0.02
"""Ranks may differ by so much of a gradient's norm: kernels that add in no fixed order do."""

_NOISE = 1e-3
"""Gradients smaller than this share of the largest are not compared: where the true one is zero, all is rounding."""


@dataclass(frozen=True)
class _Watched:
    """A parameter that several ranks hold."""

    name: str
    replica_count: int
    """How many neighbouring tensor ranks hold it."""

    is_summed: bool
    """Whether the plan has its gradient summed over them."""


class GradientWatch:
    """Compares the gradients of one backward pass, as they are after all sums over ranks, among the ranks that hold the
    same weight: all tensor ranks, or the group that shares a key/value head. Then it removes itself.
    """

    def __init__(self, model: nn.Module, plan: Plan, group: Group, ranks: int) -> None:
        """Args:
        group: of all tensor ranks. ranks: how many they are.
        """
        self._group, self._ranks = group, ranks
        self._seen: dict[_Watched, Tensor] = {}
        self._handles = []
        for entry in plan.entries:
            module = model.get_submodule(entry.name.rpartition(".")[0])
            for parameter, watched in self._watched(entry, module):
                hook = self._recorder(watched)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _watched(self, entry: PlanEntry, module: nn.Module) -> Iterator[tuple[nn.Parameter, _Watched]]:
        for number, (parameter, piece) in enumerate(entry.held(module)):
            replica_count = piece.replica_count(self._ranks)
            if parameter.requires_grad and replica_count > 1:
                name = f"{entry.name} (part {number})" if number else entry.name
                yield parameter, _Watched(name, replica_count, piece.copies > 1)

    def _recorder(self, watched: _Watched) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            wide = gradient.detach().double()
            self._seen[watched] = torch.stack([wide.norm(), wide.sum()])

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
        weights = sorted(self._seen, key=lambda watched: watched.name)
        table = all_gather(torch.stack([self._seen[watched] for watched in weights]).unsqueeze(0), 0, self._group)
        self._seen.clear()
        largest = table[..., 0].max()
        shares = [self._difference(table[:, n], watched.replica_count, largest) for n, watched in enumerate(weights)]
        share, worst = torch.stack(shares).max(0)
        if float(share) > _DIFFERENCE:
            raise PlanError(_differ(weights[int(worst)], float(share)))

    @staticmethod
    def _difference(sketches: Tensor, replica_count: int, largest: Tensor) -> Tensor:
        """Largest difference within a group of holders, as a share of the gradient's norm.

        Args:
            sketches: (tensor ranks, 2): norm and sum of one weight's gradient. largest: norm of any gradient.
        """
        groups = sketches.view(-1, replica_count, sketches.shape[-1])
        norms = groups[..., 0].amax(1)
        shares = (groups.amax(1) - groups.amin(1)).amax(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return torch.where(norms > _NOISE * largest, shares, 0).max()


def _differ(watched: _Watched, share: float) -> Problem:
    row = f"parallel.tensor_plan.{wildcard_name(watched.name.partition(' ')[0])}"
    differ = f"its gradients there differ by {100 * share:.0f} % of their norm"
    if watched.is_summed:
        return Problem(
            row,
            f"{watched.name} is held by {watched.replica_count} tensor ranks, and {differ}, though they should have "
            "been summed",
            "This is an error of the trainer: please report it with the model's configuration; set parallel.tensor "
            "so that no key/value head is shared, or to 1",
        )
    return Problem(
        row,
        f"{watched.name} is replicated on {watched.replica_count} tensor ranks, and {differ}: it is used on sharded "
        "activations",
        "Give it 'replicated_with_grad_allreduce', or shard it",
    )
