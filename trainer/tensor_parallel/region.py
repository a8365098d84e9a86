"""The cut region: where a tensor enters, where it leaves, and which random numbers are drawn in between.

A tensor *enters* once, however many modules read it: `Region.enter` remembers the last ones it was given, so q, k
and v share one all-reduce of their input's gradient, and so do attention and MLP where a family runs them side by
side. With one exit for each row layer a Llama layer costs 2 all-reduces forward and 2 backward.
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
"""Upper 16 bits of every seed for a rank's own numbers."""


class Region:
    """The cut part of a model on one rank: its group, the tensor that has entered last, and its random numbers.

    Outside the region the ranks of a group draw the same random numbers. Inside, each draws its own, so that the
    dropout of one rank's heads is not that of another's. The numbers inside follow from the state outside, and
    nothing else: a block that is computed again from a restored state draws the same again.
    """

    def __init__(
        self, group: Group, ranks: int, rank: int, *, has_dropout: bool, is_training: Callable[[], bool] = lambda: True
    ) -> None:
        self.group, self.ranks, self.rank = group, ranks, rank
        self.has_dropout, self._is_training = has_dropout, is_training
        self._cache: deque[tuple[weakref.ref[Tensor], Tensor]] = deque(maxlen=2)
        """Tensors that have entered lately, as they are outside and inside."""

        self._skips_input_reduce: set[nn.Module] = set()
        """Column layers whose input lies inside already: what it came through has entered for them."""

        self._narrow: tuple[Tensor, Tensor] | None = None
        self._deferred: Tensor | None = None
        self._deferring: set[nn.Module] = set()
        self._completing: set[nn.Module] = set()
        self._rows: set[nn.Module] = set()
        self.is_sequence_sharded = False
        """Whether hidden states outside the region are cut along the sequence."""

        self._sharded_outputs: dict[nn.Module, int] = {}
        """Row layers whose output is summed in parts, and the dimension it is cut along."""

        self._shared_state: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """`x` inside the region; the same result for the same tensor, so that its gradient is summed once."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return self._cached(x, lambda: collectives.enter_region(x, self.group))

    def _cached(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        for outside, inside in self._cache:
            if outside() is x:
                return inside
        made = make()
        self._cache.append((weakref.ref(x), made))
        return made

    def skip_input_reduce(self, column: nn.Module) -> None:
        """Makes a column layer take its input as it is: it lies inside already."""
        self._skips_input_reduce.add(column)

    def column_input_hook(self, column: nn.Module) -> Callable[[Tensor], Tensor]:
        """How the input of a column layer enters."""

        def change(x: Tensor) -> Tensor:
            self.use_rank_local_rng(x.device)
            return x if column in self._skips_input_reduce else self.enter(x)

        return change

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return collectives.reduce_from_region(x, self.group)

    def enter_gathered(self, x: Tensor, dim: int) -> Tensor:
        """The whole of `x`, of which each rank has a part along `dim`, inside the region; joined once, like `enter`."""
        return self._cached(x, lambda: collectives.gather_sequence(x, min(dim, x.ndim - 2), self.group))

    def is_row_layer(self, module: nn.Module) -> bool:
        return module in self._rows

    def keep_output_sharded(self, row: nn.Module, dim: int) -> None:
        """From now on the sum that leaves at `row` stays cut along `dim`."""
        self._sharded_outputs[row] = dim

    def fuse_reductions(self, first: nn.Module, second: nn.Module) -> None:
        """Lets two row layers whose outputs the block adds share one sum; the block computes `first` first."""
        if not self.has_dropout:  # dropout between them needs each sum by itself
            self._deferring.add(first)
            self._completing.add(second)

    def row_output_hook(self, row: nn.Module) -> Callable[[Tensor], Tensor]:
        """How the output of a row layer leaves: summed, handed to the second of a pair, or with what the first left."""

        def alone(x: Tensor) -> Tensor:
            if row in self._sharded_outputs:  # a row layer may be given all tokens in one dimension
                return collectives.reduce_scatter_sequence(x, min(self._sharded_outputs[row], x.ndim - 2), self.group)
            self.use_shared_rng(x.device)
            return self.reduce(x)

        def defer_reduce(x: Tensor) -> Tensor:
            self._deferred = x
            shape = list(x.shape)
            if row in self._sharded_outputs:
                shape[self._sharded_outputs[row]] //= self.ranks
            return collectives.defer_reduce(x, shape)

        def for_both(x: Tensor) -> Tensor:
            deferred, self._deferred = self._deferred, None
            assert deferred is not None
            return alone(x + deferred)

        self._rows.add(row)
        return defer_reduce if row in self._deferring else for_both if row in self._completing else alone

    def use_rank_local_rng(self, device: torch.device) -> None:
        """From here on each rank draws its own random numbers, until `use_shared_rng`."""
        if not (self.has_dropout and self._is_training()):
            return
        generator = _generator(device)
        if _is_rank_local(generator):
            return
        torch.empty(1, device=device).uniform_()  # else two regions in a row would draw alike
        self._shared_state = generator.get_state()
        own = zlib.crc32(self._shared_state.numpy().tobytes(), self.rank) << 16 | self.rank
        generator.manual_seed(_RANK_LOCAL << 48 | own)

    def use_shared_rng(self, device: torch.device) -> None:
        """All ranks draw the same random numbers again, as if none had been drawn in between."""
        generator = _generator(device)
        if self._shared_state is not None and _is_rank_local(generator):
            generator.set_state(self._shared_state)

    def slice_input(self, x: Tensor) -> Tensor:
        """This rank's slice of `x`, which `restore_input` gives back for it."""
        self._narrow = (collectives.split_to_region(x, -1, self.group), x)
        return self._narrow[0]

    def restore_input(self, x: Tensor) -> Tensor:
        """All ranks' parts joined, at no cost where `x` is what `slice_input` has cut last."""
        if self._narrow is not None and x is self._narrow[0]:
            return self._narrow[1]
        return collectives.gather_from_region(x, -1, self.group)

    def clear_cache(self) -> None:
        """Lets go of the tensors that it remembers."""
        self._cache.clear()
        self._narrow = None


def _is_rank_local(generator: torch.Generator) -> bool:
    """Whether it draws a rank's own numbers, now or in a state of long ago that a block is computed again from."""
    return generator.initial_seed() >> 48 == _RANK_LOCAL


def _generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
