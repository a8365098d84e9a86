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

_APART = 0x5A7E
"""Upper 16 bits of every seed for a rank's own numbers."""


class Region:
    """The cut part of a model on one rank: its group, the tensor that has entered last, and its random numbers.

    Outside the region the ranks of a group draw the same random numbers. Inside, each draws its own, so that the
    dropout of one rank's heads is not that of another's. The numbers inside follow from the state outside, and
    nothing else: a block that is computed again from a restored state draws the same again.
    """

    def __init__(
        self, group: Group, ranks: int, rank: int, *, draws: bool, is_training: Callable[[], bool] = lambda: True
    ) -> None:
        self.group, self.ranks, self.rank = group, ranks, rank
        self.draws, self._is_training = draws, is_training
        self._entered: deque[tuple[weakref.ref[Tensor], Tensor]] = deque(maxlen=2)
        """Tensors that have entered lately, as they are outside and inside."""

        self._silent: set[nn.Module] = set()
        """Column layers whose input lies inside already: what it came through has entered for them."""

        self._narrow: tuple[Tensor, Tensor] | None = None
        self._handed: Tensor | None = None
        self._firsts: set[nn.Module] = set()
        self._seconds: set[nn.Module] = set()
        self._rows: set[nn.Module] = set()
        self.sequence_is_cut = False
        """Whether hidden states outside the region are cut along the sequence."""

        self._scattering: dict[nn.Module, int] = {}
        """Row layers whose output is summed in parts, and the dimension it is cut along."""

        self._state: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """`x` inside the region; the same result for the same tensor, so that its gradient is summed once."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return self._once(x, lambda: collectives.enter(x, self.group))

    def _once(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        for outside, inside in self._entered:
            if outside() is x:
                return inside
        made = make()
        self._entered.append((weakref.ref(x), made))
        return made

    def silence(self, column: nn.Module) -> None:
        """Makes a column layer take its input as it is: it lies inside already."""
        self._silent.add(column)

    def enter_at(self, column: nn.Module) -> Callable[[Tensor], Tensor]:
        """How the input of a column layer enters."""

        def change(x: Tensor) -> Tensor:
            self.draw_apart(x.device)
            return x if column in self._silent else self.enter(x)

        return change

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return collectives.leave(x, self.group)

    def enter_joined(self, x: Tensor, dim: int) -> Tensor:
        """The whole of `x`, of which each rank has a part along `dim`, inside the region; joined once, like `enter`."""
        return self._once(x, lambda: collectives.gather_sequence(x, min(dim, x.ndim - 2), self.group))

    def is_row(self, module: nn.Module) -> bool:
        return module in self._rows

    def scatter_at(self, row: nn.Module, dim: int) -> None:
        """From now on the sum that leaves at `row` stays cut along `dim`."""
        self._scattering[row] = dim

    def pair(self, first: nn.Module, second: nn.Module) -> None:
        """Lets two row layers whose outputs the block adds share one sum; the block computes `first` first."""
        if not self.draws:  # dropout between them needs each sum by itself
            self._firsts.add(first)
            self._seconds.add(second)

    def leave_at(self, row: nn.Module) -> Callable[[Tensor], Tensor]:
        """How the output of a row layer leaves: summed, handed to the second of a pair, or with what the first left."""

        def alone(x: Tensor) -> Tensor:
            if row in self._scattering:  # a row layer may be given all tokens in one dimension
                return collectives.scatter_sequence(x, min(self._scattering[row], x.ndim - 2), self.group)
            self.draw_together(x.device)
            return self.leave(x)

        def hand_over(x: Tensor) -> Tensor:
            self._handed = x
            shape = list(x.shape)
            if row in self._scattering:
                shape[self._scattering[row]] //= self.ranks
            return collectives.hand_over(x, shape)

        def for_both(x: Tensor) -> Tensor:
            handed, self._handed = self._handed, None
            assert handed is not None
            return alone(x + handed)

        self._rows.add(row)
        return hand_over if row in self._firsts else for_both if row in self._seconds else alone

    def draw_apart(self, device: torch.device) -> None:
        """From here on each rank draws its own random numbers, until `draw_together`."""
        if not (self.draws and self._is_training()):
            return
        generator = _generator(device)
        if _is_apart(generator):
            return
        torch.empty(1, device=device).uniform_()  # else two regions in a row would draw alike
        self._state = generator.get_state()
        own = zlib.crc32(self._state.numpy().tobytes(), self.rank) << 16 | self.rank
        generator.manual_seed(_APART << 48 | own)

    def draw_together(self, device: torch.device) -> None:
        """All ranks draw the same random numbers again, as if none had been drawn in between."""
        generator = _generator(device)
        if self._state is not None and _is_apart(generator):
            generator.set_state(self._state)

    def narrow(self, x: Tensor) -> Tensor:
        """This rank's slice of `x`, which `widen` gives back for it."""
        self._narrow = (collectives.split(x, -1, self.group), x)
        return self._narrow[0]

    def widen(self, x: Tensor) -> Tensor:
        """All ranks' parts joined, at no cost where `x` is what `narrow` has cut last."""
        if self._narrow is not None and x is self._narrow[0]:
            return self._narrow[1]
        return collectives.gather(x, -1, self.group)

    def forget(self) -> None:
        """Lets go of the tensors that it remembers."""
        self._entered.clear()
        self._narrow = None


def _is_apart(generator: torch.Generator) -> bool:
    """Whether it draws a rank's own numbers, now or in a state of long ago that a block is computed again from."""
    return generator.initial_seed() >> 48 == _APART


def _generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
