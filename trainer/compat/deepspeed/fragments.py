"""Fragments of flattened parameters in the tensors that an optimizer steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FlatFragment(NamedTuple):
    """The contiguous elements of a flattened parameter that this rank steps."""

    optimizer_tensor: Tensor
    """Tensor that torch's optimizer steps, and the key of its state."""

    offset: int
    """First element of the fragment in the flattened `optimizer_tensor`."""

    parameter_offset: int
    """First element of the fragment in the flattened parameter."""

    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """View the fragment's elements (`length`,) of a tensor with as many elements as `optimizer_tensor`."""
        return tensor.view(-1)[self.offset : self.offset + self.length]


class StateFragment(NamedTuple):
    """Optimizer state of contiguous elements of a flattened parameter."""

    key: str
    """Key in the state of torch's optimizer, such as `exp_avg`."""

    elements: Tensor
    """Flat view of the values."""

    parameter_offset: int
    """First of these elements in the flattened parameter."""
