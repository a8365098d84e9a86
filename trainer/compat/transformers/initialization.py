"""Initialization of modules by the rules of their family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.dependency_check import check_names
from trainer.compat.transformers.names import MODEL, TRANSFORMERS

check_names(TRANSFORMERS, MODEL)

from transformers.initialization import TORCH_INIT_FUNCTIONS, guard_torch_init_functions


def initialize_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Set the tensors of `module`, which is part of `model`, to the random values of the family.

    A family may set tensors of modules below it as well.
    """
    model._init_weights(module)


@contextmanager
def marked_as_initialized(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep initialization from changing parameters (of any shapes)."""
    marked = list(parameters)
    for parameter in marked:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in marked:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]


@contextmanager
def initialization_context() -> Iterator[None]:
    """Fork the CPU's random number generator, and let torch's initializers skip marked parameters."""
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        yield


@contextmanager
def zeroing_initializers() -> Iterator[None]:
    """Replace torch's initializers, some of which do nothing on the meta device, by functions that write zeros."""
    functions = dict(TORCH_INIT_FUNCTIONS)
    TORCH_INIT_FUNCTIONS.update(dict.fromkeys(functions, _zero))
    try:
        yield
    finally:
        TORCH_INIT_FUNCTIONS.update(functions)


def _zero(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor.zero_()
