"""Operations on the meta device that need values, and the FLOPs of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.compat.torch.dispatch import DispatchMode, Operation, flops_of


class MetaMode(DispatchMode):
    """Substitutes constants for values of meta tensors: a number is 1, a bool is True, and no index is nonzero.

    So a mask hides nothing and no token is routed to an expert, while shapes and the order of operations are kept.
    """

    def dispatch(self, func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `DispatchMode.dispatch`."""
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default and args[0].is_meta:
            return torch.empty((0, args[0].ndim), dtype=torch.long, device="meta")
        if func is aten.where.default and args[0].is_meta:
            return [torch.empty(0, dtype=torch.long, device="meta") for _ in range(args[0].ndim)]
        if func is aten._grouped_mm.default:  # its meta kernel checks shapes for the kernels of one device
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        return super().dispatch(func, args, kwargs)


def matrix_flops(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the FLOPs of an operation that is a matrix product or convolution; 0 for any other."""
    if func is torch.ops.aten._grouped_mm.default:
        return int(2 * args[0].numel() * result.shape[-1])
    return flops_of(func, args, kwargs, result)
