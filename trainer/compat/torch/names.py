"""Supported versions of torch, and the internal names in use."""

from __future__ import annotations

from trainer.compat.dependency_check import Dependency, Names

PROCESS_GROUPS, DISPATCH = "process groups", "dispatch"

_PROCESS_GROUPS: Names = {
    "torch.distributed.distributed_c10d": {
        "_world": "registry of the process groups of this rank",
        "_set_pg_timeout": "timeout of collectives by phase of the run",
    },
    "torch.distributed.distributed_c10d._World": {
        "pg_map": "every process group of this rank, also those that DeepSpeed creates",
    },
    "torch.distributed.ProcessGroup": {
        "_register_backend": "process groups across replicas, each of which has a default group",
    },
}

_DISPATCH: Names = {
    "torch.utils._python_dispatch": {
        "TorchDispatchMode": "intercepting every operation of a trace",
    },
    "torch.utils._pytree": {
        "tree_flatten": "tensors in the outputs of modules, and the structure around them",
        "tree_unflatten": "outputs of modules that a pipeline stage does not compute",
        "tree_leaves": "tensors among the arguments and results of an operation",
    },
    "torch.utils.flop_counter": {
        "flop_registry": "FLOPs of an operation",
    },
    "torch._ops.OpOverload": {
        "_schema": "arguments that an operation writes to",
        "_overloadpacket": "looking up the FLOPs of an operation",
    },
    "torch.ops.aten": {
        "_local_scalar_dense": "reading a value of a meta tensor, which has none",
        "_grouped_mm": "matrix products of experts, whose meta kernel is stricter than the computation",
    },
    "torch.nn.Module": {
        "_forward_hooks": "whether others than the trace have hooks on a module",
    },
    "torch.Tensor": {
        "_base": "tensor that a view belongs to, which an operation on the view changes",
    },
    "torch.UntypedStorage": {
        "_cdata": "identity of a storage, on the meta device as well",
    },
}

FLIGHT_RECORDER_DUMPS: Names = {
    "torch._C._distributed_c10d": {
        "_dump_fr_trace_json": "latest collectives of a rank, for the log of a hang",
        "_dump_nccl_trace_json": "the same of NCCL only, where a version has no other recorder",
    },
}
"""Used where a version has them: without, the log of a hang has stacks only."""

REQUIRED: dict[str, Names] = {PROCESS_GROUPS: _PROCESS_GROUPS, DISPATCH: _DISPATCH}

TORCH = Dependency("torch", ">=2.10,<2.14", REQUIRED)
