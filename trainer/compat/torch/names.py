"""Supported versions of torch, and the internal names in use."""

from __future__ import annotations

from trainer.compat.guard import Dependency, Names

PROCESS_GROUPS = "process groups"

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

FLIGHT_RECORDER_DUMPS: Names = {
    "torch._C._distributed_c10d": {
        "_dump_fr_trace_json": "latest collectives of a rank, for the log of a hang",
        "_dump_nccl_trace_json": "the same of NCCL only, where a version has no other recorder",
    },
}
"""Used where a version has them: without, the log of a hang has stacks only."""

REQUIRED: dict[str, Names] = {PROCESS_GROUPS: _PROCESS_GROUPS}

TORCH = Dependency("torch", ">=2.10,<2.14", REQUIRED)
