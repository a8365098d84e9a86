"""Keys of DeepSpeed that are refused here, and why."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from trainer.compat.deepspeed.configuration import REMOVED_KEYS, REMOVED_ZERO_KEYS

_OURS = "Remove it"
UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "tensor_parallel": ("tensor parallelism is ours here", "Set parallel.tensor"),
    "pipeline": ("pipeline parallelism is ours here", "Set parallel.pipeline"),
    "expert_parallel": ("DeepSpeed's expert parallelism is not used here", _OURS),
    "sequence_parallel_size": ("DeepSpeed's Ulysses is not used here", _OURS),
    "seq_parallel_communication_data_type": ("DeepSpeed's Ulysses is not used here", _OURS),
    "use_data_before_expert_parallelism": ("DeepSpeed's expert parallelism is not used here", _OURS),
    "wandb": ("tracking is ours here", "Set tracking.wandb"),
    "tensorboard": ("tracking is ours here", _OURS),
    "csv_monitor": ("metrics.jsonl in the run directory is always written", _OURS),
    "comet": ("tracking is ours here", _OURS),
    "data_efficiency": ("the data pipeline is ours here", "Use the data section"),
    "dataloader_drop_last": ("the data pipeline is ours here", "Use the data section"),
    "checkpoint": ("DeepSpeed's own checkpoints are not used here", _OURS),
    "datastates_ckpt": ("DeepSpeed's own checkpoints are not used here", _OURS),
    "activation_checkpointing": (
        "DeepSpeed's activation checkpointing acts only on models that call it, and Hugging Face's do not",
        "Set model.activation_checkpointing",
    ),
    "autotuning": ("DeepSpeed's autotuner starts other programs than this one", _OURS),
    "compile": ("DeepCompile is not driven from here", _OURS),
    "hybrid_engine": ("it serves reinforcement learning, not training", _OURS),
    "weight_quantization": ("it serves inference, not training", _OURS),
    "torch_autocast": ("mixed precision is bf16's here", "Set bf16.enabled"),
    "managed_gradient_accumulation": ("the training step is ours here and always managed", _OURS),
    "gradient_allreduce_op": ("the loss is weighted by tokens over the global batch; gradients are averaged", _OURS),
    "disable_allgather": ("DeepSpeed reads it and does nothing", "Use zero_optimization.allgather_partitions"),
    "vocabulary_size": ("DeepSpeed only prints a warning about it", _OURS),
    "zero_force_ds_cpu_optimizer": ("it concerns optimizers made outside DeepSpeed, and none is", _OURS),
    "bfloat16": ("an old spelling", "Write bf16"),
    **{key: (message.rstrip(), "") for key, message in REMOVED_KEYS.items()},
    **{f"zero_optimization.{key}": (message.rstrip(), "") for key, message in REMOVED_ZERO_KEYS.items()},
    **{
        f"zero_optimization.{name}": ("deprecated in DeepSpeed", f"Use {field.json_schema_extra['new_param']}")
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get("deprecated")
    },
    "zero_optimization.legacy_stage1": ("removed from DeepSpeed", _OURS),
    "zero_optimization.elastic_checkpoint": ("DeepSpeed's own checkpoints are not used here", _OURS),
}
"""Keys of DeepSpeed that are refused here, dotted below `deepspeed`: (reason, remedy)."""
