"""The tensor-parallel region of a model: where tensors enter and leave it, and its random numbers.

A tensor *enters* once, however many modules read it: `Region.enter` remembers the last ones, so that q, k and v share
one all-reduce of their input's gradient. So do attention and MLP where a family computes them in parallel. With one
exit for each row layer, a Llama layer costs 2 all-reduces forward and 2 backward.
"""

from __future__ import annotations

import weakref
import zlib
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.distributed.collectives import Group
from trainer.tensor_parallel import collectives

_RANK_LOCAL = 0x5A7E
"""Upper 16 bits of every seed of rank-local random numbers."""


class Region:
    """Process group, cached inputs and RNG state of one model's tensor-parallel region on one rank.

    Outside the region the ranks of a group share their random numbers. Inside, each rank has its own, so that the
    dropout of one rank's heads is independent of another's. The rank-local state follows from the shared state and the
    rank alone: a block that is computed again from a restored state uses the same numbers again.
    """

    def __init__(
        self, group: Group, ranks: int, rank: int, *, has_dropout: bool, is_training: Callable[[], bool] = lambda: True
    ) -> None:
        """Make the region of `rank` of the `ranks` in `group`; without dropout the RNG state is never changed."""
        self.group, self.ranks, self.rank = group, ranks, rank
        self.has_dropout, self._is_training = has_dropout, is_training
        self.is_sequence_sharded = False
        """Whether hidden states outside the region are sharded along the sequence."""

        self._cache: deque[tuple[weakref.ref[Tensor], Tensor]] = deque(maxlen=2)
        """Most recently entered tensors, outside and inside the region."""

        self._skips_input_reduce: set[nn.Module] = set()
        """Column layers whose input is inside already."""

        self._sliced: tuple[Tensor, Tensor] | None = None
        """The last result of `slice_input`, and its input."""

        self._deferred: Tensor | None = None
        """Output of the first layer of a pair, until the second adds its own."""

        self._deferring: set[nn.Module] = set()
        self._completing: set[nn.Module] = set()
        self._rows: set[nn.Module] = set()
        self._sharded_outputs: dict[nn.Module, int] = {}
        """Row layers whose sum is scattered, with the dimension."""

        self._shared_state: Tensor | None = None
        """RNG state to return to at the end of the region."""

    # Inputs -----------------------------------------------------------------------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """Return `x` (any shape) inside the region: the same result for the same tensor, so that one sum serves all."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return self._cached(x, lambda: collectives.enter_region(x, self.group))

    def enter_gathered(self, x: Tensor, dim: int) -> Tensor:
        """Return the full tensor inside the region; cached. Collective: all ranks of the region must call it.

        Args:
            x: (..., features), this rank's part along `dim`; the token dimensions may be flattened to one.
            dim: the sequence dimension.
        """
        return self._cached(x, lambda: collectives.gather_sequence(x, min(dim, x.ndim - 2), self.group))

    def _cached(self, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        for outside, inside in self._cache:
            if outside() is x:
                return inside
        inside = compute()
        self._cache.append((weakref.ref(x), inside))
        return inside

    def skip_input_reduce(self, column: nn.Module) -> None:
        """Make a column layer take its input as it is, because it is inside the region already."""
        self._skips_input_reduce.add(column)

    def column_input_hook(self, column: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function that the input of a column layer passes through."""

        def enter(x: Tensor) -> Tensor:
            self.use_rank_local_rng(x.device)
            return x if column in self._skips_input_reduce else self.enter(x)

        return enter

    def slice_input(self, x: Tensor) -> Tensor:
        """Return this rank's slice of `x` (..., features), which `restore_input` turns back into `x`."""
        self._sliced = (collectives.split_to_region(x, -1, self.group), x)
        return self._sliced[0]

    def restore_input(self, x: Tensor) -> Tensor:
        """Return the full tensor (..., features) of a slice; no communication for the last result of `slice_input`."""
        if self._sliced is not None and x is self._sliced[0]:
            return self._sliced[1]
        return collectives.gather_from_region(x, -1, self.group)

    # Outputs ----------------------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` (any shape). Collective: all ranks of the region must call it."""
        return collectives.reduce_from_region(x, self.group)

    def is_row_layer(self, module: nn.Module) -> bool:
        """Return whether the module is a row layer of the region."""
        return module in self._rows

    def keep_output_sharded(self, row: nn.Module, dim: int) -> None:
        """Scatter the sum of a row layer's outputs along `dim`, from now on."""
        self._sharded_outputs[row] = dim

    def fuse_reductions(self, first: nn.Module, second: nn.Module) -> None:
        """Make two row layers whose outputs the block adds share one sum; the block computes `first` first."""
        if not self.has_dropout:  # dropout between the two needs each sum alone
            self._deferring.add(first)
            self._completing.add(second)

    def row_output_hook(self, row: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function that the output of a row layer passes through.

        It sums the output; or, in a pair of layers, it keeps the output of the first and adds it to that of the second.
        """

        def reduce(x: Tensor) -> Tensor:
            if row in self._sharded_outputs:  # the token dimensions may be flattened to one
                dim = min(self._sharded_outputs[row], x.ndim - 2)
                return collectives.reduce_scatter_sequence(x, dim, self.group)
            self.use_shared_rng(x.device)
            return self.reduce(x)

        def defer(x: Tensor) -> Tensor:
            self._deferred = x
            shape = list(x.shape)
            if row in self._sharded_outputs:
                shape[self._sharded_outputs[row]] //= self.ranks
            return collectives.defer_reduce(x, shape)

        def complete(x: Tensor) -> Tensor:
            deferred, self._deferred = self._deferred, None
            assert deferred is not None
            return reduce(x + deferred)

        self._rows.add(row)
        return defer if row in self._deferring else complete if row in self._completing else reduce

    # Random numbers ---------------------------------------------------------------------------------------------------

    def use_rank_local_rng(self, device: torch.device) -> None:
        """Give each rank its own random numbers, until `use_shared_rng`."""
        if not (self.has_dropout and self._is_training()):
            return
        generator = _generator(device)
        if _is_rank_local(generator):
            return
        torch.empty(1, device=device).uniform_()  # so that the next region starts from another state
        self._shared_state = generator.get_state()
        seed = zlib.crc32(self._shared_state.numpy().tobytes(), self.rank) << 16 | self.rank
        generator.manual_seed(_RANK_LOCAL << 48 | seed)

    def use_shared_rng(self, device: torch.device) -> None:
        """Give all ranks the same random numbers again, unaffected by those drawn inside the region."""
        generator = _generator(device)
        if self._shared_state is not None and _is_rank_local(generator):
            generator.set_state(self._shared_state)

    def clear_cache(self) -> None:
        """Release the tensors of a forward pass."""
        self._cache.clear()
        self._sliced = None


def _is_rank_local(generator: torch.Generator) -> bool:
    """Return whether random numbers are rank-local, in this pass or in a state that a block is recomputed from."""
    return generator.initial_seed() >> 48 == _RANK_LOCAL


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator of dropout on `device`."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
