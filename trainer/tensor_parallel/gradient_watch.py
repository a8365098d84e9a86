"""Comparison of gradients between ranks that hold the same weight: they must be equal, which a plan cannot prove.

A weight that is replicated but used on sharded activations has another gradient on each rank, unless the gradients are
summed; and so has a key/value head that several ranks share. The loss does not reveal it; the first backward pass does.
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

_MAX_DIFFERENCE = 0.02
"""Largest difference between ranks, as a share of the gradient's norm: kernels that add in no fixed order differ."""

_NOISE = 1e-3
"""Gradients smaller than this share of the largest are not compared: if the true one is zero, all is rounding."""


@dataclass(frozen=True)
class _Watched:
    """A parameter that several ranks hold."""

    name: str
    replica_count: int
    """Number of neighboring tensor ranks that hold it."""

    is_summed: bool
    """Whether the plan sums its gradient over them."""


class GradientWatch:
    """Compares the gradients of one backward pass, after all sums over ranks, among the ranks that hold a weight.

    These are all tensor ranks, or the ranks that share a key/value head. The watch removes itself after that.
    """

    def __init__(self, model: nn.Module, plan: Plan, group: Group, ranks: int) -> None:
        """Watch the parameters that several of the `ranks` tensor ranks, which are in `group`, hold."""
        self._group, self._ranks = group, ranks
        self._sketches: dict[_Watched, Tensor] = {}
        """(2) of each parameter: norm and sum of its gradient."""

        self._handles = []
        for entry in plan.entries:
            module = model.get_submodule(entry.name.rpartition(".")[0])
            for parameter, watched in self._watched(entry, module):
                hook = self._recorder(watched)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _watched(self, entry: PlanEntry, module: nn.Module) -> Iterator[tuple[nn.Parameter, _Watched]]:
        for number, (parameter, shard) in enumerate(entry.local_parameters(module)):
            replica_count = shard.replica_count(self._ranks)
            if parameter.requires_grad and replica_count > 1:
                name = f"{entry.name} (part {number})" if number else entry.name
                yield parameter, _Watched(name, replica_count, shard.copies > 1)

    def _recorder(self, watched: _Watched) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            wide = gradient.detach().double()
            self._sketches[watched] = torch.stack([wide.norm(), wide.sum()])

        return record

    def verify(self) -> None:
        """Compare the gradients, and stop watching. Collective: all ranks of the group must call it.

        Raises:
            PlanError: naming the weight whose gradients differ most.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._sketches:
            return
        weights = sorted(self._sketches, key=lambda watched: watched.name)
        local_W2 = torch.stack([self._sketches[watched] for watched in weights])
        sketches_RW2 = all_gather(local_W2.unsqueeze(0), 0, self._group)
        self._sketches.clear()
        largest = sketches_RW2[..., 0].max()
        differences = [
            self._difference(sketches_RW2[:, number], watched.replica_count, largest)
            for number, watched in enumerate(weights)
        ]
        difference, worst = torch.stack(differences).max(0)
        if float(difference) > _MAX_DIFFERENCE:
            raise PlanError(_problem(weights[int(worst)], float(difference)))

    @staticmethod
    def _difference(sketches_R2: Tensor, replica_count: int, largest: Tensor) -> Tensor:
        """Return the largest difference () within a group of ranks that hold a weight, as a share of the norm.

        Args:
            sketches_R2: (tensor ranks, 2): norm and sum of one weight's gradient.
            replica_count: size of the groups.
            largest: (): norm of the largest gradient of all weights.
        """
        groups = sketches_R2.view(-1, replica_count, sketches_R2.shape[-1])
        norms = groups[..., 0].amax(1)
        shares = (groups.amax(1) - groups.amin(1)).amax(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return torch.where(norms > _NOISE * largest, shares, 0).max()


def _problem(watched: _Watched, difference: float) -> Problem:
    key = f"parallel.tensor_plan.{wildcard_name(watched.name.partition(' ')[0])}"
    differ = f"its gradients there differ by {100 * difference:.0f} % of their norm"
    if watched.is_summed:
        return Problem(
            key,
            f"{watched.name} is held by {watched.replica_count} tensor ranks, and {differ}, though they should have "
            "been summed",
            "This is an error of the trainer: please report it with the model's configuration; set parallel.tensor "
            "so that no key/value head is shared, or to 1",
        )
    return Problem(
        key,
        f"{watched.name} is replicated on {watched.replica_count} tensor ranks, and {differ}: it is used on sharded "
        "activations",
        "Give it 'replicated_with_grad_allreduce', or shard it",
    )
