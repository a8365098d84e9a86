"""Classes and functions of DeepSpeed whose internals are used, imported once their names are checked."""

from __future__ import annotations

from trainer.compat.deepspeed.names import DEEPSPEED, TRAINING
from trainer.compat.dependency_check import check_names

check_names(DEEPSPEED, TRAINING)

from deepspeed.comm import pg_utils
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import FusedLion
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine, DualPipeVModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.swap_tensor import optimizer_utils
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm, is_model_parallel_parameter
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

__all__ = [
    "BF16_Optimizer",
    "DeepSpeedCPUAdam",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DualPipeVEngine",
    "DualPipeVModule",
    "FP16_Optimizer",
    "FP16_UnfusedOptimizer",
    "FusedAdam",
    "FusedLion",
    "GatheredParameters",
    "Init",
    "PipeModelDataParallelTopology",
    "PipelineEngine",
    "PipelineModule",
    "combine_grad_norm_groups",
    "is_invalid_grad_norm",
    "is_model_parallel_parameter",
    "optimizer_utils",
    "pg_utils",
    "schedule",
    "unfused_optimizer",
]
