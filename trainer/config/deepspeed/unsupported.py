"""Keys of DeepSpeed that are refused, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from trainer.compat.deepspeed.configuration import REMOVED_KEYS, REMOVED_ZERO_KEYS

_REMOVE = "Remove it"
UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "tensor_parallel": ("Tessera implements tensor parallelism itself", "Set parallel.tensor"),
    "pipeline": ("Tessera configures pipelines itself", "Set parallel.pipeline"),
    "expert_parallel": ("DeepSpeed's expert parallelism is not supported", _REMOVE),
    "sequence_parallel_size": ("DeepSpeed's Ulysses is not supported", _REMOVE),
    "seq_parallel_communication_data_type": ("DeepSpeed's Ulysses is not supported", _REMOVE),
    "use_data_before_expert_parallelism": ("DeepSpeed's expert parallelism is not supported", _REMOVE),
    "wandb": ("Tessera has its own trackers", "Set tracking.wandb"),
    "tensorboard": ("Tessera has its own trackers", _REMOVE),
    "csv_monitor": ("metrics.jsonl in the run directory is always written", _REMOVE),
    "comet": ("Tessera has its own trackers", _REMOVE),
    "data_efficiency": ("Tessera has its own data pipeline", "Use the data section"),
    "dataloader_drop_last": ("Tessera has its own data pipeline", "Use the data section"),
    "checkpoint": ("DeepSpeed's checkpoints are not used", _REMOVE),
    "datastates_ckpt": ("DeepSpeed's checkpoints are not used", _REMOVE),
    "activation_checkpointing": (
        "DeepSpeed's activation checkpointing acts only on models that call it, and Hugging Face's do not",
        "Set model.activation_checkpointing",
    ),
    "autotuning": ("DeepSpeed's autotuner starts other programs", _REMOVE),
    "compile": ("DeepCompile is not supported", _REMOVE),
    "hybrid_engine": ("it is for reinforcement learning", _REMOVE),
    "weight_quantization": ("it is for inference", _REMOVE),
    "torch_autocast": ("mixed precision is configured with bf16", "Set bf16.enabled"),
    "managed_gradient_accumulation": ("Tessera always manages gradient accumulation", _REMOVE),
    "gradient_allreduce_op": ("the loss is weighted by tokens over the global batch; gradients are averaged", _REMOVE),
    "disable_allgather": ("it has no effect in DeepSpeed", "Use zero_optimization.allgather_partitions"),
    "vocabulary_size": ("it only makes DeepSpeed print a warning", _REMOVE),
    "zero_force_ds_cpu_optimizer": ("it applies to optimizers that are created outside DeepSpeed", _REMOVE),
    "bfloat16": ("a former name", "Use bf16"),
    **{key: (message.rstrip(), "") for key, message in REMOVED_KEYS.items()},
    **{f"zero_optimization.{key}": (message.rstrip(), "") for key, message in REMOVED_ZERO_KEYS.items()},
    **{
        f"zero_optimization.{name}": ("deprecated in DeepSpeed", f"Use {field.json_schema_extra['new_param']}")
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get("deprecated")
    },
    "zero_optimization.legacy_stage1": ("removed from DeepSpeed", _REMOVE),
    "zero_optimization.elastic_checkpoint": ("DeepSpeed's checkpoints are not used", _REMOVE),
}
"""Reason and remedy of each unsupported key, dotted below `deepspeed`."""
