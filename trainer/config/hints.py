"""Keys of other trainers, with ours.

Hugging Face's TrainingArguments, Axolotl, LLaMA-Factory, Megatron, torchtitan, and DeepSpeed's command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.errors import Problem

_TABLE = """
run.output_dir: dump_folder save_dir output_path
run.name: run_name wandb_name wandb_run_id experiment_name wandb_exp_name
run.seed: data_seed random_seed
model.path: model_name_or_path base_model pretrained_model_name_or_path hf_assets_path model_name
    pretrained_checkpoint initial_load_path base_model_config
model.attention: attn_implementation flash_attention flash_attn use_flash_attn sdp_attention
model.activation_checkpointing: gradient_checkpointing recompute_activations recompute_granularity
    checkpoint_activations activation_checkpoint activation_checkpoint.mode
data.train: dataset datasets dataset_name dataset_path train_file train_dataset train_data data_path train_data_path
    dataset_dir train_files
data.validation: validation_file eval_dataset test_datasets valid_data_path val_set_size eval_file validation_split
    val_size validation_split_percentage validation_dataset
data.sequence_length: seq_length seq_len sequence_len max_seq_length max_seq_len cutoff_len block_size max_length
    model_max_length context_length
data.packing: sample_packing neat_packing pack_sequences
data.drop_last: dataloader_drop_last
data.text_field: text_column dataset_text_field text_key text_column_name
data.tokenizer: tokenizer_name tokenizer_path tokenizer_config tokenizer_name_or_path tokenizer_model
data.cache_dir: dataset_prepared_path data_cache_path
training.max_steps: train_iters total_steps training_steps max_train_steps num_steps training.steps
training.epochs: num_train_epochs num_epochs max_epochs n_epochs
training.log_every_steps: logging_steps log_interval log_freq print_freq metrics.log_freq
training.label_smoothing: label_smoothing_factor
training.z_loss: z_loss_weight output_z_loss
evaluation.every_steps: eval_steps eval_interval evaluation_strategy eval_strategy evals_per_epoch validation.freq
evaluation.max_batches: eval_iters max_eval_batches eval_max_batches
checkpoint.every_steps: save_steps save_interval checkpoint_interval save_strategy saves_per_epoch
    checkpoint.interval save_freq
checkpoint.keep_last: save_total_limit keep_latest_k max_checkpoints
checkpoint.keep_best: load_best_model_at_end metric_for_best_model
checkpoint.asynchronous: async_save async_mode
checkpoint.resume: resume_from_checkpoint load_checkpoint auto_resume_from_checkpoints
parallel.tensor: tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree tp_size tp
    model_parallel_size autotp_size
parallel.pipeline: pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pp_size pp
    pipe_parallel_size
parallel.pipeline_schedule: pipeline_parallel_schedule
deepspeed.train_batch_size: global_batch_size batch_size
deepspeed.train_micro_batch_size_per_gpu: per_device_train_batch_size per_gpu_train_batch_size micro_batch_size
    local_batch_size device_batch_size micro_batch_size_per_gpu
deepspeed.gradient_accumulation_steps: grad_accum_steps gradient_accumulation accumulate_grad_batches
deepspeed.gradient_clipping: max_grad_norm clip_grad max_norm grad_clip gradient_clip_val
deepspeed.optimizer: optimizer
deepspeed.optimizer.type: optim optimizer_type optimizer.name
deepspeed.optimizer.params.lr: learning_rate lr base_lr peak_lr
deepspeed.optimizer.params.weight_decay: weight_decay
deepspeed.optimizer.params.betas: adam_beta1 adam_beta2 betas
deepspeed.optimizer.params.eps: adam_epsilon adam_eps
deepspeed.scheduler: lr_scheduler scheduler
deepspeed.scheduler.type: lr_scheduler_type lr_decay_style lr_schedule
deepspeed.scheduler.params.warmup_num_steps: warmup_steps warmup_ratio lr_warmup_iters lr_warmup_steps
    num_warmup_steps lr_warmup_fraction warmup_iters
deepspeed.scheduler.params.total_num_steps: lr_decay_iters lr_decay_steps
deepspeed.scheduler.params.cos_min_ratio: min_lr min_lr_ratio min_lr_factor cosine_min_lr_ratio
deepspeed.bf16.enabled: bf16 mixed_precision_param mixed_precision torch_dtype precision dtype
deepspeed.fp16.enabled: fp16
deepspeed.zero_optimization: zero_optimization
deepspeed.zero_optimization.stage: zero_stage fsdp fsdp_config use_distributed_optimizer data_parallel_shard_degree
deepspeed.zero_optimization.offload_optimizer: cpu_offload optimizer_offload enable_cpu_offload
tracking.wandb.mode: report_to wandb_mode use_wandb enable_wandb
tracking.wandb.project: wandb_project
tracking.wandb.entity: wandb_entity
tracking.wandb.group: wandb_group
tracking.wandb: wandb
"""
"""Our keys, each followed by its names in other trainers. A name with a dot is matched below that section only."""


def _keys_by_name(table: str) -> Iterator[tuple[str, str]]:
    key = ""
    for word in table.split():
        if word.endswith(":"):
            key = word.removesuffix(":")
        else:
            yield word, key


TARGETS: Mapping[str, str] = dict(_keys_by_name(_TABLE))
"""Our key by name in other trainers."""

_ABSENT: Mapping[str, str] = {
    "adapters are not supported: all weights are trained": "adapter peft peft_config lora lora_r lora_rank lora_alpha "
    "lora_dropout lora_target lora_target_modules",
    "quantized weights are not supported": "load_in_4bit load_in_8bit quantization_bit bnb_4bit_quant_type",
    "code from a model directory is never executed": "trust_remote_code",
    "context parallelism is not supported": "context_parallel_size context_parallel_degree context_parallel",
    "expert parallelism is not supported": "expert_model_parallel_size expert_parallel_degree expert_parallel",
    "torch.compile is not supported": "torch_compile compile",
    "text is tokenized once, before training, so there are no workers to set": "dataloader_num_workers num_workers "
    "preprocessing_num_workers",
    "logs and metrics.jsonl are written to run.output_dir": "logging_dir tensorboard_dir",
}
"""Names in other trainers, by the reason why there is no such key."""

_REASONS = {name: reason for reason, names in _ABSENT.items() for name in names.split()}


def hint(key: str) -> Problem | None:
    """Return the problem of an unknown key that other trainers have; None for one that they do not have either.

    Args:
        key: Dotted, as the user wrote it.
    """
    section, _, name = key.lower().rpartition(".")
    below = f"{section.rpartition('.')[2]}.{name}"
    target = TARGETS.get(below, TARGETS.get(name))
    if target is not None and target != key:
        return Problem(key, f"unknown key; that is {target} here")
    reason = _REASONS.get(name)
    return None if reason is None else Problem(key, f"unknown key; {reason}", "Remove it")
