"""Parameters that ZeRO 3 partitions over the data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.interfaces import MPUProtocol
from trainer.compat.deepspeed.internals import GatheredParameters, Init

Partition = Callable[[Sequence[nn.Parameter]], None]


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO 3 has partitioned a parameter, which is then empty except while it is gathered."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the full shape of a parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_elements(parameter: Tensor) -> tuple[Tensor, int]:
    """View this rank's elements of a parameter in the model's type, without padding.

    Returns:
        A flat view, and the offset of its first element in the flattened parameter.
    """
    if not is_partitioned(parameter):
        return parameter.detach().view(-1), 0
    partition = parameter.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
    offset = dist.get_rank(parameter.ds_process_group) * partition.numel()  # type: ignore[attr-defined]
    count = max(0, min(partition.numel(), int(parameter.ds_numel) - offset))  # type: ignore[attr-defined]
    return partition[:count], offset


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[None]:
    """Hold the full parameter within. Collective: all ranks of its data group must call it."""
    with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
        yield


def partitioner(settings: dict[str, Any], dtype: torch.dtype, mpu: MPUProtocol) -> Partition:
    """Make a function that partitions full parameters over the data ranks as soon as they are materialized.

    `deepspeed.zero.Init` does so in the constructors of modules only; here, modules exist before their weights. The
    function is collective: all data ranks must call it with the same parameters.
    """
    context: Any = None

    def partition(parameters: Sequence[nn.Parameter]) -> None:
        nonlocal context
        if context is None:  # its constructor allocates buffers on the device
            context = Init(
                config_dict_or_path=settings,
                dtype=dtype,
                mpu=mpu,
                data_parallel_group=mpu.get_data_parallel_group(),
            )
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        context._convert_to_zero_parameters(list(parameters))

    return partition
