"""A table of invalid configurations and inputs, with the exit status and the message that each must cause.

A row changes the valid configuration of `tests/configs.py`: `values` sets keys (None removes one), `text` replaces the
text of the file, `files` are written below the folder of the test and are named with `{tmp}`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save


@dataclass(frozen=True)
class Bad:
    name: str
    status: int
    says: tuple[str, ...]
    """Texts that the message must contain."""

    values: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    rule: str = ""
    """The rule of `trainer/config/rules/` that this row violates."""

    needs_data: bool = False
    """Whether the input is refused after its configuration was loaded: by its data, tokenizer, weights or model."""


def train_file(name: str) -> dict[str, Any]:
    return {"data__train": [{"path": "{tmp}/" + name}]}


def llama(**changes: object) -> dict[str, Any]:
    return {f"model__config__{key}": value for key, value in changes.items()}


def zero(**keys: object) -> dict[str, Any]:
    return {"deepspeed__zero_optimization": keys}


def optimizer(kind: str, **params: object) -> dict[str, Any]:
    return {"deepspeed__optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: object) -> dict[str, Any]:
    return {"deepspeed__scheduler": {"type": kind, "params": params}}


def folder(tensors: dict[str, Any], **config: object) -> dict[str, bytes]:
    """Return the files of a model folder."""
    sizes = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return {
        "model/config.json": json.dumps(sizes | config).encode(),
        "model/model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def in_folder(**model: object) -> dict[str, Any]:
    return {"model": {"path": "{tmp}/model", **model}, "data__tokenizer": "{tokenizer}"}


SOUND_LINE = b'{"text": "seven wizards brew potions of quartz and jade while the quick fox jumps"}\n'

BAD_INPUTS = [
    # The file itself.
    Bad("comment", 2, ("line 2, column", "JSON has no comments"), text='{\n  // our run\n  "run": {}}'),
    Bad("byte order mark", 2, ("line 1, column 1", "byte order mark"), text="\ufeff{}"),
    Bad("truncated", 2, ("line 1, column", "ends before"), text='{"run": {"output_dir": "x"'),
    Bad("truncated string", 2, ("line 1, column", "ends before"), text='{"run": {"output_d'),
    Bad("trailing comma", 2, ("line 2, column", "comma"), text='{"run": {},\n}'),
    Bad("single quotes", 2, ("double quotes",), text="{'run': {}}"),
    Bad("duplicate key", 2, ("line 1, column 18", "duplicate key 'seed'"), text='{"run":{"seed":1,"seed":2}}'),
    Bad("not an object", 2, ("expected a JSON object, got list",), text="[1]"),
    Bad("empty file", 2, ("line 1, column 1", "ends before"), text=""),
    Bad("NaN", 2, ("config.json: run: must be a finite number (got NaN)",), text='{"run": NaN}'),
    Bad("infinite number", 2, ("config.json: deepspeed.optimizer.params.lr: must be a finite number (got 1e999)", "training.0: must be a finite number (got -Infinity)"), text='{"deepspeed": {"optimizer": {"params": {"lr": 1e999}}}, "training": [-Infinity]}'),
    Bad("infinite number in the model", 2, ("config.json: model.config.rope_theta: must be a finite number (got 1e400)",), text='{"model": {"config": {"rope_theta": 1e400}}}'),
    Bad("extends nothing", 2, ("base.json", "no such file"), values={"extends": "base.json"}),
    Bad("extends itself", 2, ("extends itself",), values={"extends": "config.json"}),
    # Unknown keys at every level.
    Bad("misspelt section", 2, ("trainning: unknown section; did you mean 'training'?",), values={"trainning": {"max_steps": 1}}),
    Bad("key of another section", 2, ("max_steps: unknown section; 'training.max_steps' is a key",), values={"max_steps": 3}),
    Bad("misspelt key", 2, ("parallel.tensr: unknown key; did you mean 'tensor'?",), values={"parallel__tensr": 1}),
    Bad("misspelt key in a list", 2, ("data.train.0.pth: unknown key; did you mean 'path'?",), values={"data__train": [{"pth": "x"}]}),
    Bad("misspelt nested key", 2, ("tracking.wandb.projct: unknown key; did you mean 'project'?",), values={"tracking__wandb__projct": "x"}),
    Bad("misspelt DeepSpeed key", 2, ("deepspeed.train_batch_sise: unknown key; did you mean 'train_batch_size'?",), values={"deepspeed__train_batch_sise": 8}),
    Bad("misspelt ZeRO key", 2, ("deepspeed.zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",), values=zero(stage=1, overlap_com=True)),
    Bad("misspelt offload key", 2, ("zero_optimization.offload_optimizer.devise: unknown key; did you mean 'device'?",), values=zero(stage=1, offload_optimizer={"devise": "cpu"})),
    Bad("misspelt optimizer parameter", 2, ("deepspeed.optimizer.params.weight_decy: unknown key; did you mean 'weight_decay'?",), values=optimizer("AdamW", weight_decy=0.1), rule="optimizer_valid"),
    Bad("misspelt model key", 2, ("model.config.hidden_sise: unknown key for model type 'llama'; did you mean 'hidden_size'?",), values=llama(hidden_sise=8)),
    Bad("replaced key", 2, ("data.append_end_of_text: replaced by 'data.special_tokens'", '"end" stands for true'), values={"data__append_end_of_text": True}),
    Bad("two mistakes at once", 2, ("2 mistakes", "run.sed", "training.max_stps"), values={"run__sed": 1, "training__max_stps": 3}),
    # Types.
    Bad("bool for int", 2, ("training.max_steps: expected whole number, got true",), values={"training__max_steps": True}),
    Bad("string for int", 2, ('data.sequence_length: expected whole number, got "32"',), values={"data__sequence_length": "32"}),
    Bad("float for int", 2, ("training.max_steps: expected whole number",), values={"training__max_steps": 2.5}),
    Bad("bool for batch size", 2, ("deepspeed.train_batch_size: expected whole number", "got true"), values={"deepspeed__train_batch_size": True}),
    Bad("bool for model size", 2, ("model.config.hidden_size: must be a whole number of at least 1 (got True)",), values=llama(hidden_size=True)),
    Bad("wrong weights without decay", 2, ("training.weight_decay_exclude", "expected 'biases_and_norms' or array"), values={"training__weight_decay_exclude": "biases"}),
    Bad("negative scale", 2, ("training.learning_rate_scales.*.bias: expected greater than or equal to 0, got -1",), values={"training__learning_rate_scales": {"*.bias": -1}}),
    Bad("number for section", 2, ("evaluation: expected an object, got 3",), values={"evaluation": 3}),
    Bad("zero steps", 2, ("training.max_steps", "greater than or equal to 1"), values={"training__max_steps": 0}),
    Bad("ZeRO 4", 2, ("zero_optimization.stage: expected 0, 1, 2 or 3, got 4",), values=zero(stage=4)),
    Bad("wrong choice", 2, ("data.packing: expected 'concatenate' or 'none', got \"best_fit\"",), values={"data__packing": "best_fit"}),
    Bad("wrong special tokens", 2, ("data.special_tokens: expected 'tokenizer', 'end' or 'none', got \"bos\"",), values={"data__special_tokens": "bos"}),
    Bad("bad learning rate", 2, ("deepspeed.optimizer.params.lr: expected a number >= 0, got True",), values=optimizer("AdamW", lr=True)),
    # Missing.
    Bad("no section", 2, ("training: required, but missing",), values={"training": None}),
    Bad("no key", 2, ("training.max_steps: required, but missing",), values={"training__max_steps": None}),
    Bad("no length", 2, ("training.max_steps: required, but missing. Set it, or training.epochs",), values={"training": {"log_every_steps": 1}}, rule="training_length_is_steps_or_epochs"),
    Bad("two lengths", 2, ("training.epochs: must not be set together with training.max_steps = 4 (got 2)", "--set training.epochs=null"), values={"training__epochs": 2}),
    Bad("no epochs", 2, ("training.epochs: expected greater than 0, got 0",), values={"training": {"epochs": 0}}),
    Bad("schedule that ends before the epochs", 2, ("scheduler.params.total_steps: must be at least the 139 steps of training.epochs (10)",), values={"training": {"epochs": 10}, **scheduler("OneCycleLR", max_lr=0.1, total_steps=3)}, needs_data=True),
    Bad("no optimizer", 2, ("deepspeed.optimizer: required, but missing",), values={"deepspeed__optimizer": None}),
    Bad("no training data", 2, ("data.train",), values={"data__train": []}),
    # Keys of DeepSpeed that are refused here.
    Bad("AutoTP", 2, ("deepspeed.tensor_parallel", "parallel.tensor"), values={"deepspeed__tensor_parallel": {"autotp_size": 2}}),
    Bad("DeepSpeed's wandb", 2, ("deepspeed.wandb", "tracking.wandb"), values={"deepspeed__wandb": {"enabled": True}}),
    Bad("removed from DeepSpeed", 2, ("deepspeed.elasticity", "has been removed"), values={"deepspeed__elasticity": {}}),
    Bad("removed from ZeRO", 2, ("deepspeed.zero_optimization.mics_shard_size", "has been removed"), values=zero(stage=3, mics_shard_size=2)),
    Bad("deprecated in ZeRO", 2, ("zero_optimization.cpu_offload", "offload_optimizer"), values=zero(stage=2, cpu_offload=True)),
    Bad("unresolvable auto", 2, ('deepspeed.optimizer.params.lr: "auto" cannot be resolved',), values=optimizer("AdamW", lr="auto")),
    Bad("no time for collectives", 2, ("run.collective_timeout_seconds", "0"), values={"run__collective_timeout_seconds": 0}),
    Bad("redacted secret", 2, ("checkpoint.upload: its secret was removed when this configuration was stored", "Set the whole URL"), values={"checkpoint__upload": "s3://***@bucket/run"}, rule="secrets_present"),
    Bad("tensor ranks without end", 2, ("parallel.tensor: must divide the 4 attention heads of llama (got 1000000000)", "does is 4"), values={"parallel__tensor": 10**9}),
    Bad("layers without end", 2, ("model.config.num_hidden_layers: must be at most 10000 (got 1e+09)",), values=llama(num_hidden_layers=10**9)),
    Bad("heads without end", 2, ("model.config.num_attention_heads: must be at most 2147483648",), values=llama(num_attention_heads=2**63 - 1)),
    Bad("deeply nested file", 2, ("nested more than 100 levels deep",), text='{"run": ' + '{"a": ' * 100_000),
    Bad("deeply nested sound file", 2, ("nested more than 100 levels deep",), text='{"run": ' + "[" * 500 + "]" * 500 + "}"),
    Bad("escape in a key", 2, (r"run.\x1b]0;owned\x07\nkey: unknown key",), values={"run__\x1b]0;owned\x07\nkey": 1}),
    # Across sections.
    Bad("batch arithmetic", 2, ("deepspeed.train_batch_size: must be a multiple of", "3 x 1 = 3 (got 8)"), values={"deepspeed__train_micro_batch_size_per_gpu": 3}, rule="batch_sizes_consistent"),
    Bad("all three do not multiply", 2, ("must be micro-batch x accumulation x data ranks, 2 x 2 x 1 = 4 (got 8)",), values={"deepspeed__gradient_accumulation_steps": 2}),
    Bad("one batch key", 2, ("two of the three batch keys are required",), values={"deepspeed__train_micro_batch_size_per_gpu": None}),
    Bad("both precisions", 2, ("bf16.enabled and fp16.enabled are both true",), values={"deepspeed__bf16": {"enabled": True}, "deepspeed__fp16": {"enabled": True}}, rule="bf16_excludes_fp16"),
    Bad("fp16 on a CPU", 2, ("deepspeed.fp16.enabled", "does not support fp16 on CPUs"), values={"deepspeed__fp16": {"enabled": True}}, rule="device_supported"),
    Bad("fp16 at ZeRO 0", 2, ("deepspeed.fp16.enabled: at ZeRO stage 0",), values={**zero(stage=0), "deepspeed__fp16": {"enabled": True}}, rule="fp16_requires_zero"),
    Bad("bf16 master weights at ZeRO 0", 2, ("bf16_master_weights_and_grads", "stage 1, 2 or 3"), values={"deepspeed__bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, rule="half_precision_states_require_zero"),
    Bad("other parameter type", 2, ("data_types.param_dtype", "must be the precision of the run, 'fp32' (got 'bf16')"), values={"deepspeed__data_types": {"param_dtype": "bf16"}}, rule="data_types_match_precision"),
    Bad("offload at ZeRO 0", 2, ("offload_optimizer", "requires stage 1 or higher (got 0)"), values=zero(stage=0, offload_optimizer={"device": "cpu"}), rule="offload_requires_zero_stage"),
    Bad("offloaded parameters at ZeRO 2", 2, ("offload_param", "requires stage 3 or higher (got 2)"), values=zero(stage=2, offload_param={"device": "cpu"})),
    Bad("NVMe without its path", 2, ("offload_optimizer.nvme_path: required, but missing",), values=zero(stage=3, offload_optimizer={"device": "nvme"}), rule="nvme_offload_available"),
    Bad("NVMe that is not there", 2, ("offload_optimizer.nvme_path: '/nowhere' is not a directory",), values=zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/nowhere"})),
    Bad("NVMe at ZeRO 2", 2, ("offload_optimizer.device: 'nvme' requires stage 3",), values=zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"})),
    Bad("too few buffers for NVMe", 2, ("offload_optimizer.buffer_count: must be at least 8: weights, gradients and 2 moments of 2 sub-groups", "at least 8"), values=zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp", "pipeline_read": True})),
    Bad("parameters on NVMe", 2, ("offload_param.device: 'nvme' fails in DeepSpeed 0.19",), values=zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/tmp"})),
    Bad("optimizer state in two places", 2, ("offload_optimizer.ratio: must be 1",), values=zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), rule="optimizer_state_checkpointable"),
    Bad("SuperOffload", 2, ("offload_optimizer.super_offload: must be false",), values=zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True})),
    Bad("ZenFlow", 2, ("zero_optimization.zenflow: a checkpoint cannot hold its state",), values=zero(stage=2, offload_optimizer={"device": "cpu"}, zenflow={"topk_ratio": 0.1})),
    Bad("no norm at ZeRO 3", 2, ("deepspeed.zero_optimization", "compute_grad_norm"), values={**zero(stage=3, compute_grad_norm=False), "deepspeed__gradient_clipping": 0}, rule="deepspeed_sections_valid"),
    Bad("clipping without a norm", 2, ("compute_grad_norm: must be true, because gradients are clipped at a norm of 0.5",), values=zero(stage=1, compute_grad_norm=False), rule="clipping_requires_grad_norm"),
    Bad("offload without a norm", 2, ("compute_grad_norm: must be true with offload_optimizer",), values={**zero(stage=1, compute_grad_norm=False, offload_optimizer={"device": "cpu"}), "deepspeed__gradient_clipping": 0}),
    Bad("misspelt weight without decay", 2, ("training.weight_decay_exclude: '*.layernrm.weight' matches no trained weight; did you mean '*.input_layernorm.weight'?",), values={"training__weight_decay_exclude": ["*.layernrm.weight"]}, needs_data=True),
    Bad("scale that matches no weight", 2, ("training.learning_rate_scales: 'embed' matches no trained weight. Names are full Hugging Face names, such as 'model.embed_tokens.weight'",), values={"training__learning_rate_scales": {"embed": 0.1}}, needs_data=True),
    Bad("scale of a tied name", 2, ("training.learning_rate_scales: 'lm_head.*' matches no trained weight, but a name that is tied to 'model.embed_tokens.weight'",), values={"training__learning_rate_scales": {"lm_head.*": 0.1}, **llama(tie_word_embeddings=True)}, needs_data=True),
    Bad("two scales of one weight", 2, ("training.learning_rate_scales: '*.weight' and '*.mlp.*' match 'model.layers.0.mlp.gate_proj.weight'",), values={"training__learning_rate_scales": {"*.weight": 0.1, "*.mlp.*": 2}}, needs_data=True),
    Bad("unknown optimizer", 2, ("unknown optimizer 'AdmW'; did you mean 'AdamW'?",), values=optimizer("AdmW")),
    Bad("optimizer that evaluates again", 2, ("LBFGS", "several times a step"), values=optimizer("LBFGS", lr=1.0)),
    Bad("Adafactor under ZeRO", 2, ("Adafactor", "would change the algorithm"), values={**optimizer("Adafactor", lr=0.01), **zero(stage=1)}),
    Bad("Muon with reduce-scatter", 2, ("reduce_scatter", "must be false for Muon at ZeRO 3"), values={**optimizer("Muon", lr=0.01), **zero(stage=3)}),
    Bad("Muon without a norm", 2, ("compute_grad_norm: must be true, because Muon's update uses the norm",), values={**optimizer("Muon", lr=0.01), **zero(stage=1, compute_grad_norm=False), "deepspeed__gradient_clipping": 0}, rule="muon_supported"),
    Bad("Muon in bf16 with fp32 accumulation", 2, ("deepspeed.optimizer.type", "does not support Muon in bf16 at this ZeRO stage with gradients accumulated in fp32"), values={**optimizer("Muon", lr=0.01), **zero(stage=1), "deepspeed__bf16": {"enabled": True}, "deepspeed__data_types": {"grad_accum_dtype": "fp32"}}),
    Bad("Muon in bf16 in a pipeline at ZeRO 0", 2, ("deepspeed.optimizer.type", "does not support Muon in bf16 at this ZeRO stage in a pipeline"), values={**optimizer("Muon", lr=0.01), "deepspeed__bf16": {"enabled": True}, "parallel__pipeline": 2, "deepspeed__train_batch_size": None, "deepspeed__gradient_accumulation_steps": 2}),
    Bad("legacy fusion over tensor ranks", 2, ("deepspeed.optimizer.legacy_fusion: must be false with parallel.tensor = 2",), values={"deepspeed__optimizer": {"type": "AdamW", "params": {"lr": 0.01}, "legacy_fusion": True}, "parallel__tensor": 2, "deepspeed__train_batch_size": None, "deepspeed__gradient_accumulation_steps": 2}, rule="legacy_fusion_excludes_tensor_parallel"),
    Bad("Lamb", 2, ("optimizer.type: DeepSpeed 0.19 supports Lamb only with fp16 at ZeRO stage 0",), values=optimizer("Lamb", lr=0.01)),
    Bad("WSD longer than the run", 2, ("scheduler.params.decay_num_steps: must be at most total_num_steps - warmup_num_steps = 2 (got 3)",), values=scheduler("WSD", warmup_num_steps=2, decay_num_steps=3, total_num_steps="auto"), rule="wsd_phases_fit"),
    Bad("WSD that decays upwards", 2, ("scheduler.params.decay_min_lr: must be at most the peak rate, optimizer.params.lr = 0.002",), values=scheduler("WSD", decay_num_steps=2, total_num_steps=4, decay_min_lr=0.01)),
    Bad("WSD without its decay", 2, ("scheduler.params.decay_num_steps: required, but missing",), values=scheduler("WSD", total_num_steps=4)),
    Bad("WSD with another decay", 2, ("scheduler.params.decay_type: expected 'linear', 'cosine' or '1-sqrt', got 'exponential'",), values=scheduler("WSD", decay_num_steps=2, total_num_steps=4, decay_type="exponential")),
    Bad("WSD with a share", 2, ("scheduler.params.decay_num_steps: expected a whole number >= 0, got 0.1",), values=scheduler("WSD", decay_num_steps=0.1, total_num_steps=4)),
    Bad("misspelt parameter of WSD", 2, ("scheduler.params.decay_steps: unknown key; did you mean 'decay_num_steps'?",), values=scheduler("WSD", decay_num_steps=2, decay_steps=2, total_num_steps=4)),
    Bad("WSD with several decays", 2, ("scheduler.params.decay_type: expected 'linear', 'cosine' or '1-sqrt', got ['linear']",), values=scheduler("WSD", decay_num_steps=2, total_num_steps=4, decay_type=["linear"])),
    Bad("WSD that raises Adam's rate next to Muon", 2, ("scheduler.params.decay_min_lr: must be at most the peak rate, optimizer.params.adam_lr = 0.001",), values={**optimizer("Muon", lr=0.02, adam_lr=0.001), **scheduler("WSD", decay_num_steps=2, total_num_steps=4, decay_min_lr=0.01)}),
    Bad("rates of groups that there may not be", 2, ("deepspeed.scheduler.params.max_lr: must be one number, for all parameter groups (got [0.1, 0.2])",), values=scheduler("OneCycleLR", max_lr=[0.1, 0.2], total_steps=10)),
    Bad("no rate at all", 2, ("deepspeed.scheduler.params.lr_range_test_min_lr: must be one number",), values=scheduler("LRRangeTest", lr_range_test_min_lr=[])),
    Bad("unknown scheduler", 2, ("unknown scheduler 'WarmupCosine'; did you mean 'WarmupCosineLR'?",), values=scheduler("WarmupCosine"), rule="scheduler_valid"),
    Bad("scheduler without its length", 2, ("scheduler.params.total_num_steps: required",), values=scheduler("WarmupDecayLR")),
    Bad("auto peak without a rate", 2, ("warmup_max_lr", "optimizer.params.lr"), values={**optimizer("AdamW"), **scheduler("WarmupLR", warmup_max_lr="auto")}, rule="auto_warmup_max_lr_requires_lr"),
    Bad("nesterov without momentum", 2, ("deepspeed.optimizer.params: Nesterov momentum requires",), values=optimizer("SGD", lr=0.1, nesterov=True)),
    Bad("amsgrad in DeepSpeed's Adam", 2, ("deepspeed.optimizer.params", "does not support amsgrad"), values=optimizer("AdamW", amsgrad=True)),
    Bad("scheduler value of another type", 2, ("deepspeed.scheduler.params: ",), values=scheduler("StepLR", step_size=0)),
    Bad("schedule that ends too early", 2, ("scheduler.params.total_steps: must be at least training.max_steps (4)",), values=scheduler("OneCycleLR", max_lr=0.1, total_steps=3), rule="one_cycle_covers_all_steps"),
    Bad("ZeRO 2 with a pipeline", 2, ("deepspeed.zero_optimization.stage: must be 0 or 1 with parallel.pipeline = 2", "Set it to 0 or 1"), values={"parallel__pipeline": 2, **zero(stage=2)}, rule="pipeline_excludes_gradient_partitioning"),
    Bad("timers under a pipeline", 2, ("deepspeed.wall_clock_breakdown: must be false", "deepspeed.flops_profiler.enabled: must be false"), values={"parallel__pipeline": 2, "deepspeed__wall_clock_breakdown": True, "deepspeed__flops_profiler": {"enabled": True}}, rule="pipeline_excludes_deepspeed_profilers"),
    Bad("layers of other stages", 2, ("parallel.pipeline_layers: must have 2 numbers, one for each stage, with parallel.pipeline = 2 (got [1, 1, 1])",), values={"parallel__pipeline": 2, "parallel__pipeline_layers": [1, 1, 1]}, rule="pipeline_stages_consistent"),
    Bad("weights of other stages", 2, ("parallel.pipeline_weights: must have 2 numbers, one for each pipeline rank (got [1.0])",), values={"parallel__pipeline": 2, "parallel__pipeline_weights": [1.0]}),
    Bad("layers and weights of stages", 2, ("parallel.pipeline_weights: has no effect, because pipeline_layers",), values={"parallel__pipeline": 2, "parallel__pipeline_layers": [1, 1], "parallel__pipeline_weights": [1, 2]}),
    Bad("two ways with too few micro-batches", 2, ("parallel.pipeline_schedule", "requires a pipeline, and parallel.pipeline is 1", "requires at least 2 micro-batches a step (got 1)"), values={"parallel__pipeline_schedule": "dualpipev", "deepspeed__train_micro_batch_size_per_gpu": 8}, rule="dualpipev_requirements_met"),
    Bad("no last sample to drop", 2, ("data.drop_last: true has no effect with data.packing 'none'",), values={"data__packing": "none", "data__drop_last": True}, rule="drop_last_requires_concatenation"),
    Bad("two ways with many shapes", 2, ("parallel.pipeline_schedule: 'dualpipev' requires micro-batches of one shape",), values={"parallel__pipeline_schedule": "dualpipev", "data__packing": "none"}),
    Bad("a stage without layers", 2, ("parallel.pipeline_layers.1", "greater than or equal to 1"), values={"parallel__pipeline": 2, "parallel__pipeline_layers": [2, 0]}),
    Bad("heads and tensor ranks", 2, ("parallel.tensor", "must divide the 4 attention heads of llama (got 3)", "smaller size that does is 2"), values={"parallel__tensor": 3, "deepspeed__train_batch_size": None}, rule="attention_heads_divisible_by_tensor"),
    Bad("Muon on parts of matrices", 2, ("deepspeed.optimizer.type", "Muon computes its update from full matrices", "parallel.tensor = 2"), values={"parallel__tensor": 2, "deepspeed__train_batch_size": None, **optimizer("Muon", lr=0.01)}, rule="optimizer_supports_tensor_parallel"),
    Bad("sequence does not divide", 2, ("data.sequence_length", "must be a multiple of parallel.tensor = 2", "(got 33)", "Set it to 32"), values={"parallel__tensor": 2, "parallel__sequence_parallel": True, "data__sequence_length": 33, "deepspeed__train_batch_size": None}, rule="sequence_length_divisible_by_tensor"),
    Bad("sequence parallel alone", 2, ("parallel.sequence_parallel", "parallel.tensor is 1"), values={"parallel__sequence_parallel": True}),
    Bad("plan row that matches nothing", 2, ("parallel.tensor_plan.layers.*.mlp.up_prj", "matches no module", "did you mean"), values={"parallel__tensor_plan": {"layers.*.mlp.up_prj": "colwise"}}, needs_data=True),
    Bad("unknown style", 2, ("parallel.tensor_plan.layers.*.mlp.up_proj", "'colwize' is not a style", "did you mean 'colwise'?"), values={"parallel__tensor_plan": {"layers.*.mlp.up_proj": "colwize"}}, needs_data=True),
    Bad("processes do not divide", 2, ("parallel: tensor x pipeline must divide the number of processes, 1 (got 2)",), values={"parallel__pipeline": 2}, rule="world_size_divisible_by_model_parallel_size"),
    Bad("evaluation of nothing", 2, ("evaluation.every_steps", "no data to evaluate on"), values={"evaluation__every_steps": 2, "data__validation": []}, rule="evaluation_requires_validation_data"),
    Bad("weighted validation", 2, ("data.validation.0.weight",), values={"data__validation": [{"path": "{tmp}/good.jsonl", "weight": 2.0}]}, files={"good.jsonl": SOUND_LINE * 9}, rule="validation_sources_unweighted"),
    Bad("validation without a source", 2, ("data.validation.0: either 'path' or 'fraction' is required (got neither)",), values={"data__validation": [{}]}, rule="validation_source_is_path_or_fraction"),
    Bad("validation with two sources in one", 2, ("data.validation.0: either 'path' or 'fraction' is required (got both)",), values={"data__validation": [{"path": "{tmp}/good.jsonl", "fraction": 0.1}]}, files={"good.jsonl": SOUND_LINE * 9}),
    Bad("two fractions", 2, ("data.validation.1.fraction: data.validation.0 already holds out a fraction",), values={"data__validation": [{"fraction": 0.1}, {"fraction": 0.2}]}),
    Bad("fraction of all", 2, ("data.validation.0.fraction: expected less than 1, got 1",), values={"data__validation": [{"fraction": 1}]}),
    Bad("fraction that holds out nothing", 2, ("data.validation.0.fraction: 1e-06 of 400 training documents holds out none", "Raise it"), values={"data__validation": [{"fraction": 1e-6}]}, needs_data=True),
    Bad("fraction that holds out a source", 2, ("data.validation.0.fraction: 0.9999 holds out all 1 documents of", "a .txt file is one document"), values={**train_file("a.txt"), "data__validation": [{"fraction": 0.9999}]}, files={"a.txt": b"seven wizards\n" * 99}, needs_data=True),
    Bad("fraction of training", 2, ("data.train.0.fraction: unknown key",), values={"data__train": [{"fraction": 0.1}]}),
    Bad("validation on training data", 2, ("is also trained on",), values={**train_file("*.jsonl"), "data__validation": [{"path": "{tmp}/good.jsonl"}]}, files={"good.jsonl": SOUND_LINE * 9}, rule="validation_excludes_training_files"),
    # The model.
    Bad("unknown model type", 2, ("model.config.model_type", "did you mean 'llama'?"), values=llama(model_type="lama")),
    Bad("no decoder", 2, ("'vit' has no causal language model",), values={"model__config": {"model_type": "vit"}}),
    Bad("heads do not divide", 2, ("model.config", "not a multiple of the number of attention heads"), values=llama(num_attention_heads=5)),
    Bad("an encoder as a causal model", 2, ("model.config.is_decoder: 'bert' sees later tokens", "the loss at position", "Set it to true"), values={"model__config": {"model_type": "bert", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64, "is_decoder": False}}, needs_data=True),
    Bad("heads do not divide, found by the constructor", 2, ("model: transformers refuses it",), values={"model__config": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 30, "n_head": 4, "n_layer": 1}}, needs_data=True),
    Bad("no width", 2, ("model.config.hidden_size: must be a whole number of at least 1 (got 0)",), values=llama(hidden_size=0)),
    Bad("several sizes that make no sense", 2, ("3 mistakes", "model.config.num_hidden_layers: must be a whole number of at least 1 (got -1)", "model.config.num_attention_heads: must be a whole number of at least 1 (got 0)", "model.config.intermediate_size: must be a whole number of at least 1 (got '64')"), values=llama(num_hidden_layers=-1, num_attention_heads=0, intermediate_size="64")),
    Bad("no layers in a folder", 2, ("model/config.json: num_hidden_layers: must be a whole number of at least 1 (got -1)",), values=in_folder(), files=folder({}, num_hidden_layers=-1)),
    Bad("key/value heads do not divide", 2, ("model.config.num_key_value_heads: must divide the 4 attention heads (got 3)",), values=llama(num_key_value_heads=3)),
    Bad("more experts a token than there are", 2, ("model.config.num_experts_per_tok: must be between 1 and the number of experts, 4 (got 5)",), values=llama(model_type="mixtral", num_local_experts=4, num_experts_per_tok=5)),
    Bad("automatic bucket without a size", 2, ("zero_optimization.reduce_bucket_size", "derived from the hidden size, and 'blt' has several"), values={"model__config": {"model_type": "blt"}, **zero(stage=1, reduce_bucket_size="auto")}, rule="auto_buckets_require_hidden_size"),
    Bad("path and config", 2, ("either 'path' or 'config' is required (got both)",), values={"model__path": "{tmp}"}, rule="model_is_path_or_config"),
    Bad("family that sees later tokens", 2, ("model.config.model_type: 'xlnet' sees later tokens", "Take another family"), values={"model__config": {"model_type": "xlnet", "vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}}, rule="model_family_is_causal"),
    Bad("pretrained without weights", 2, ("model.initialize",), values={"model__initialize": "pretrained"}),
    Bad("model folder missing", 2, ("model.path: './nowhere' does not exist",), values={"model": {"path": "./nowhere"}}),
    Bad("model folder of another working folder", 2, ("model.path: 'nowhere' is not a folder in /", "and as a name on the hub it cannot be read", "Check the name, the network, or the folder"), values={"model": {"path": "nowhere"}}),
    Bad("model folder without config", 2, ("holds no config.json",), values={"model": {"path": "{tmp}"}}),
    Bad("model folder with pickles only", 2, ("holds no *.safetensors", "pytorch_model.bin", "can run code"), values={"model": {"path": "{tmp}/model"}, "data__tokenizer": "{tokenizer}"}, rule="weights_are_safetensors", files={"model/config.json": b'{"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}', "model/pytorch_model.bin": b"x"}),
    Bad("quantized folder", 2, ("model.path: the weights in", "are quantized", "config.json: quantization_config has quant_method 'fp8'", "save_pretrained"), values=in_folder(), files=folder({}, quantization_config={"quant_method": "fp8"})),
    Bad("quantized weights", 2, ("model.path: the weights in", "are quantized", "1 weights stored as I8", "1 scales", "model.norm.weight_scale"), values=in_folder(allow_unexpected_keys=True), files=folder({"model.norm.weight": np.zeros(32, np.int8), "model.norm.weight_scale": np.ones(1)}), needs_data=True),
    Bad("unexpected keys", 2, ("model.path: ", "unexpected keys", "got 1:", "model.layers.7.mlp.up_proj.weight", "model.allow_unexpected_keys"), values=in_folder(), files=folder({"model.layers.7.mlp.up_proj.weight": np.ones(3)}), needs_data=True),
    Bad("NaN in the weights", 2, ("model.path: weights in", "NaN or infinite", "model.norm.weight in model.safetensors: 2 of 32 values"), values=in_folder(), files=folder({"model.norm.weight": np.array([np.nan, np.inf] + [1.0] * 30)}), needs_data=True),
    Bad("text without a tokenizer", 2, ("model.path: no tokenizer can be loaded from", "the folder holds none of tokenizer.json, tokenizer.model, vocab.json", "set data.tokenizer"), values={"model": {"path": "{tmp}/model"}}, files=folder({}, model_type="gpt2"), needs_data=True),
    Bad("tokenizer settings without its vocabulary", 2, ("model.path: no tokenizer can be loaded from", "the folder holds none of tokenizer.json", "only tokenizer_config.json"), values={"model": {"path": "{tmp}/model"}}, files={**folder({}), "model/tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}'}, needs_data=True),
    Bad("tokenizer that encodes nothing", 2, ("data.tokenizer: no tokenizer can be loaded from", "it encodes any text, such as 'seven wizards', as no token"), values={"data__tokenizer": "{tmp}/empty"}, files={"empty/tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}', "empty/tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None, "model": {"type": "BPE", "vocab": {"\u16a0": 0, "\u16a2": 1}, "merges": []}}).encode()}, needs_data=True),
    Bad("code in an inline config", 2, ("model.config.auto_map", "can make transformers run code"), values=llama(auto_map={"AutoModel": "x.Y"})),
    Bad("reformer of another length", 2, ("data.sequence_length: must be 24, the product of axial_pos_shape", "(got 32)"), values={"model__config": {"model_type": "reformer", "vocab_size": 320, "is_decoder": True, "hidden_size": 64, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 6]}}),
    Bad("sequence longer than positions", 2, ("data.sequence_length: must be at most 64, the positions of the model (got 65)",), values={"data__sequence_length": 65}, rule="sequence_length_fits_model"),
    Bad("vocabulary smaller than tokenizer's", 2, ("model.config.vocab_size: 300 is smaller than the tokenizer's vocabulary of 320",), values={**llama(vocab_size=300), "data__tokenizer": "{tokenizer}"}, needs_data=True),
    Bad("vocabulary too small for bytes", 2, ("model.config.vocab_size: 100 is smaller than",), values=llama(vocab_size=100), needs_data=True),
    Bad("tokenizer missing", 2, ("data.tokenizer: './nowhere' is not a folder",), values={"data__tokenizer": "./nowhere"}, rule="tokenizer_available"),
    # Plugins.
    Bad("plugin that is not installed", 2, ("run.plugins: there is no module 'no_such_package'. Install its package",), values={"run__plugins": ["no_such_package"]}),
    Bad("plugin that is not a module name", 2, ("run.plugins.0: expected", 'got "../wizard"'), values={"run__plugins": ["../wizard"]}),
    Bad("model type of a plugin that is not named", 2, ("transformers has no model type 'wizard'", "name the package in run.plugins"), values=llama(model_type="wizard")),
    # Paths.
    Bad("missing file", 2, ("data.train.0.path: './nowhere.jsonl' does not exist",), values={"data__train": [{"path": "./nowhere.jsonl"}]}, rule="data_paths_readable"),
    Bad("glob without match", 2, ("data.train.0.path", "matches no file"), values=train_file("*.jsonl")),
    Bad("folder without text", 2, ("is a folder without",), values={"data__train": [{"path": "{tmp}/empty"}]}, files={"empty/notes.md": b"x"}),
    Bad("unknown kind of file", 2, ("has an unknown format",), values=train_file("a.pdf"), files={"a.pdf": b"x"}),
    Bad("unknown built-in", 2, ("unknown built-in corpus 'builtin:wikipedia'",), values={"data__train": [{"path": "builtin:wikipedia"}]}),
    Bad("token file without index", 2, ("has no index",), values={**train_file("a.bin"), "data__validation": []}, files={"a.bin": b"x"}),
    Bad("hub without network", 2, ("'hf://nobody/nothing' cannot be loaded from the hub",), values={"data__train": [{"path": "hf://nobody/nothing"}]}, needs_data=True),
    Bad("text and tokens in one folder", 2, ("holds both text and token files",), values={"data__train": [{"path": "{tmp}/both"}]}, files={"both/a.txt": b"x", "both/a.bin": b"x", "both/a.idx": b"x"}),
    Bad("tokens without their tokenizer", 2, ("data.tokenizer: required to read",), values=train_file("low.bin"), files={"low.bin": b"{tokens to 300}", "low.idx": b""}),
    Bad("cache that cannot be written", 2, ("data.cache_dir", "cannot be written to"), values={"data__cache_dir": "/proc/nowhere"}, rule="cache_directory_writable"),
    Bad("output below a file", 2, ("run.output_dir", "is a file"), values={"run__output_dir": "{tmp}/a.txt/run"}, files={"a.txt": b"x"}, rule="output_directory_writable"),
    Bad("parts of a run directory in the wrong place", 2, ("2 mistakes", "run/final is a file", "run/metrics.jsonl is a folder"), values={"run__output_dir": "{tmp}/run"}, files={"run/final": b"x", "run/metrics.jsonl/x": b""}, rule="run_directory_layout_valid"),
    # Inside the data.
    Bad("empty data file", 3, ("a.jsonl", "contains no text"), values=train_file("a.jsonl"), files={"a.jsonl": b""}),
    Bad("broken JSON line", 3, ("a.jsonl: line 3: not JSON",), values=train_file("a.jsonl"), files={"a.jsonl": SOUND_LINE * 2 + b'{"text": "x"\n'}),
    Bad("JSON array without a comma", 3, ("a.json: line 2: not a JSON array: expected ',' or ']'",), values=train_file("a.json"), files={"a.json": b"[" + SOUND_LINE * 2 + b"]"}),
    Bad("truncated archive", 3, ("a.jsonl.gz: line 1: cannot be decompressed:", "truncated"), values=train_file("a.jsonl.gz"), files={"a.jsonl.gz": gzip.compress(SOUND_LINE * 9)[:-20]}),
    Bad("archive by name only", 3, ("a.txt.zst: line 1: cannot be decompressed:", "not what its name says"), values=train_file("a.txt.zst"), files={"a.txt.zst": SOUND_LINE * 9}),
    Bad("compressed file of another kind", 2, ("a.csv.gz' has an unknown format",), values=train_file("a.csv.gz"), files={"a.csv.gz": b"x"}),
    Bad("JSON line of another type", 3, ("a.jsonl: line 2: expected a JSON object, got list",), values=train_file("a.jsonl"), files={"a.jsonl": SOUND_LINE + b"[1]\n"}),
    Bad("not UTF-8", 3, ("a.txt: line 2: not UTF-8 (byte 0xff)",), values=train_file("a.txt"), files={"a.txt": b"fine\nnot \xff fine\n"}),
    Bad("line nested 2 million deep", 3, ("a.jsonl: line 2: nested too deep",), values=train_file("a.jsonl"), files={"a.jsonl": SOUND_LINE + b'{"text": "x", "more": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}\n"}),
    Bad("number of 5,000 digits", 3, ("a.jsonl: line 1: not JSON that can be read",), values=train_file("a.jsonl"), files={"a.jsonl": b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n"}),
    Bad("line that is too long", 3, ("a.jsonl: line 2: a document of more than 5,000 bytes; data.max_document_bytes allows 5,000",), values={**train_file("a.jsonl"), "data__max_document_bytes": 5000}, files={"a.jsonl": SOUND_LINE + b'{"text": "' + b"x" * 5000 + b'"}\n'}),
    Bad("cell that is too long", 3, ("a.csv: row 2: a document of 6,000 bytes; data.max_document_bytes allows 5,000",), values={**train_file("a.csv"), "data__max_document_bytes": 5000}, files={"a.csv": b"text\nx\n" + b"y" * 6000 + b"\n"}),
    Bad("limit of zero bytes", 2, ("data.max_document_bytes",), values={"data__max_document_bytes": 0}),
    Bad("no such text field", 3, ("a.jsonl: line 1: no field 'body', only 'text'",), values={**train_file("a.jsonl"), "data__text_field": "body"}, files={"a.jsonl": SOUND_LINE}),
    Bad("half a surrogate pair", 3, ("a.jsonl: line 2: half a surrogate pair at character 3",), values=train_file("a.jsonl"), files={"a.jsonl": SOUND_LINE + b'{"text": "hi \\ud83d there"}\n'}),
    Bad("text field of another type", 3, ("a.jsonl: line 1: field 'text' holds int",), values=train_file("a.jsonl"), files={"a.jsonl": b'{"text": 3}\n'}),
    Bad("broken parquet", 3, ("a.parquet",), values=train_file("a.parquet"), files={"a.parquet": b"PAR1 and nothing"}),
    Bad("CSV without the field", 3, ("a.csv", "no field 'text', only 'body'"), values=train_file("a.csv"), files={"a.csv": b"body\nhello\n"}),
    Bad("too little text", 3, ("fewer than one sample", "Set data.drop_last to false"), values={**train_file("a.txt"), "data__drop_last": True}, files={"a.txt": b"hello\n"}),
    Bad("a single token", 3, ("one.bin: 1 tokens, and a sample has 2 at least",), values={**train_file("one.bin"), "data__validation": []}, files={"one.bin": b"{tokens to 001}", "one.idx": b""}),
    Bad("broken index", 3, ("a.idx", "not a Megatron index"), values={**train_file("a.bin"), "data__validation": []}, files={"a.bin": b"xx", "a.idx": b"nothing"}),
    Bad("truncated tokens", 3, ("truncated",), values={**train_file("cut.bin"), "data__validation": []}, files={"cut.bin": b"xx", "cut.idx": b"{index of 100 tokens}"}),
    Bad("token ids outside the vocabulary", 3, ("high.bin: sample", "outside the model's vocabulary of 320"), values={**train_file("high.bin"), "data__validation": []}, files={"high.bin": b"{tokens to 400}", "high.idx": b""}),
]  # fmt: skip
