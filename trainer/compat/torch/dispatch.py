"""Interception of tensor operations: dispatch modes, operator schemas and pytrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from trainer.compat.dependency_check import check_names
from trainer.compat.torch.names import DISPATCH, TORCH

check_names(TORCH, DISPATCH)

from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = [
    "DispatchMode",
    "Operation",
    "flops_of",
    "has_several_forward_hooks",
    "pytree",
    "storage_id",
    "view_base",
    "written_tensors",
]


Operation = Callable[..., Any]
"""An overload of an operator (`torch._ops.OpOverload`)."""


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, dispatch: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dispatch = dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._dispatch(func, args, kwargs or {})


class DispatchMode:
    """Calls `dispatch` in place of every operation on tensors while it is entered."""

    def __enter__(self) -> Self:
        self._mode = _Mode(self.dispatch)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(error_type, error, trace)  # type: ignore[no-untyped-call]

    def dispatch(self, func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute an operation."""
        return func(*args, **kwargs)


def written_tensors(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the arguments that an operation writes to, of any shapes."""
    parameters = func._schema.arguments  # type: ignore[attr-defined]
    values = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | dict(kwargs)
    for parameter in parameters:
        value = values.get(parameter.name)
        if parameter.alias_info is not None and parameter.alias_info.is_write and isinstance(value, Tensor):
            yield value


def storage_id(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, on the meta device as well. The shape does not matter."""
    return int(tensor.untyped_storage()._cdata)


def view_base(tensor: Tensor) -> Tensor | None:
    """Return the tensor that `tensor` is a view of, with the base's own shape; None if it is not a view."""
    return tensor._base


def flops_of(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the FLOPs of an operation by torch's formulas; 0 without a formula."""
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)  # type: ignore[attr-defined]
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def has_several_forward_hooks(module: nn.Module) -> bool:
    """Return whether more than one hook runs after a module's forward pass."""
    return len(module._forward_hooks) > 1
