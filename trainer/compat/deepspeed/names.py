"""Supported versions of DeepSpeed, and the internal names in use."""

from __future__ import annotations

from trainer.compat.dependency_check import Dependency, Names

_PIPE, _ZERO, _FP16 = "deepspeed.runtime.pipe", "deepspeed.runtime.zero", "deepspeed.runtime.fp16"
_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_STAGES_1_AND_2 = f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer"
_STAGE_3 = f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"

CONFIGURATION, TRAINING, MUON = "configuration", "training", "muon"

_CONFIGURATION: Names = {
    "deepspeed.runtime.config": {
        "_REMOVED_TOP_LEVEL_CONFIG_KEYS": "refusing removed configuration keys with DeepSpeed's own message",
        "_REMOVED_ZERO_CONFIG_KEYS": "refusing removed keys of zero_optimization with DeepSpeed's own message",
    },
}

_STATE: Names = {
    _ENGINE: {
        "global_steps": "optimizer steps taken, saved in and restored from checkpoints",
        "global_samples": "samples seen, saved in and restored from checkpoints",
        "skipped_steps": "steps skipped because a gradient was not finite, saved in and restored from checkpoints",
        "micro_steps": "micro-batches computed, by which the engine finds the last one of a step",
    },
    f"{_FP16}.loss_scaler.DynamicLossScaler": {
        "dynamic": "whether the loss scale has state to save",
    },
    f"{_ZERO}.partition_parameters.Init": {
        "_convert_to_zero_parameters": "partitioning parameters as soon as they are materialized",
        "ds_id": "recognizing a ZeRO-3 parameter",
        "ds_tensor": "this rank's partition of a ZeRO-3 parameter",
        "ds_numel": "number of elements of a ZeRO-3 parameter",
        "ds_shape": "shape of a ZeRO-3 parameter",
        "ds_process_group": "ranks over which a ZeRO-3 parameter is partitioned",
    },
}

_OPTIMIZERS: Names = {
    f"{_FP16}.fused_optimizer.FP16_Optimizer": {
        "fp16_groups": "parameters in half precision, by group",
        "fp16_groups_flat": "flat buffer of the parameters in half precision",
        "fp32_groups_flat": "flat buffer of the master weights",
    },
    f"{_FP16}.unfused_optimizer.FP16_UnfusedOptimizer": {
        "fp16_groups": "parameters in half precision, by group",
        "fp32_groups": "master weights, by group",
        "mpu": "ranks over which the gradient norm is reduced",
    },
    f"{_FP16}.unfused_optimizer": {
        "get_weight_norm": "replaced: norm of one group",
        "get_global_norm": "replaced: norm over all groups and tensor ranks",
    },
    _BF16: {
        "fp32_groups_flat_partition": "this rank's flat buffer of master weights, by group",
        "update_lp_params": "copying master weights into the model weights",
        "_hp_optimizer_states_linked": "linking parameters to optimizer state again after a checkpoint is loaded",
        "clear_lp_grads": "clearing gradients in half precision before a stage's backward pass",
        "update_hp_grads": "adding gradients in half precision to the fp32 accumulators",
        "_hp_grad": "fp32 gradient of a weight that several pipeline stages hold",
    },
    "deepspeed.utils.tensor_fragment.tensor_fragment": {
        "param_group_index": "group of a parameter's fragment",
        "hp_fragment_address": "where the fragment is in this rank's flat buffer",
        "lp_fragment_address": "where the fragment is in the parameter",
    },
    "deepspeed.utils.mixed_precision_linkage.link_hp_params": {
        "_hp_mapping": "fragment of a parameter that this rank steps under ZeRO 1 and 2",
    },
    _STAGES_1_AND_2: {
        "single_partition_of_fp32_groups": "this rank's flat buffer of master weights, by group",
        "params_in_partition": "parameters whose Muon momentum this rank keeps",
        "cpu_offload": "whether Muon keeps full momentum",
        "update_lp_params": "copying master weights into the model weights",
        "_hp_optimizer_states_linked": "linking parameters to optimizer state again after a checkpoint is loaded",
        "get_gradient_for_reduction": "gradient of a weight that several pipeline stages hold",
        "model_parallel_group": "ranks over which the gradient norm is reduced",
        "_model_parallel_all_reduce": "replaced: reduction of the gradient norm, once per group",
        "scaled_global_norm": "replaced: gradient norm",
        "ds_pipe_replicated": "leaving weights that another stage counts out of the gradient norm",
    },
    _STAGE_3: {
        "grad_position": "where a parameter's partition is in a flat buffer",
        "get_param_id": "key of a parameter in grad_position",
        "fp32_partitioned_groups_flat": "flat buffers of master weights, by sub-group",
        "sub_group_to_group_id": "parameter group of a sub-group",
        "optimizer_swapper": "optimizer state on NVMe",
        "_optimizer_states_and_gradient_swap_in": "reading a sub-group from NVMe",
        "_optimizer_states_and_gradient_swap_out": "writing a sub-group to NVMe",
        "_release_swap_buffers": "releasing a sub-group read from NVMe",
        "checkpoint_event_prologue": "removing parameter hooks before model weights are written",
        "checkpoint_event_epilogue": "restoring parameter hooks after model weights are written",
        "_reassign_or_swap_out_partitioned_parameters": "copying master weights into the model weights",
        "_get_norm_groups": "replaced: gradient norm of each sub-group",
        "_model_parallel_all_reduce": "replaced: reduction of the gradient norm, once per sub-group",
        "model_parallel_group": "ranks over which the gradient norm is reduced",
    },
    "deepspeed.runtime.utils": {
        "is_model_parallel_parameter": "counting replicated weights once in the gradient norm",
        "combine_grad_norm_groups": "gradient norm of all groups",
        "is_invalid_grad_norm": "recognizing a step that will be skipped",
    },
    "deepspeed.runtime.utils.is_model_parallel_parameter": {
        "tensor_model_parallel": "counting sharded weights on every tensor rank in the gradient norm",
    },
    "deepspeed.comm.pg_utils": {
        "is_parallel": "recognizing a group of more than one rank",
    },
}

_NVME: Names = {
    "deepspeed.runtime.swap_tensor.optimizer_utils": {
        "AIO_ALIGNED_BYTES": "replaced: alignment of writes to NVMe",
    },
    "deepspeed.runtime.swap_tensor.optimizer_utils.OptimizerSwapper": {
        "swap_params_info": "files of a sub-group on NVMe",
        "swap_folder": "directory of the files on NVMe",
        "_adjust_for_misaligned_lengths": "replaced: gradients that NVMe cannot read back stay in memory",
        "swappable": "marking a gradient that stays in memory",
    },
    "deepspeed.runtime.swap_tensor.optimizer_utils.OptimizerStateSwapInfo": {
        "compute_tensor": "optimizer state of a sub-group",
        "swap_path": "file of a tensor on NVMe",
        "tensors": "tensors of a sub-group on NVMe",
    },
}

_PIPELINE: Names = {
    f"{_PIPE}.engine.PipelineEngine": {
        "_INSTRUCTION_MAP": "replaced: instructions of the schedule",
        "_exec_backward_pass": "backward pass of the loss, or of a single tensor",
        "_exec_optimizer_step": "optimizer step at the end of the schedule",
        "_running_engine_backward": "telling DeepSpeed's hooks that a backward pass is the engine's",
        "_config": "bf16 settings that the backward pass follows",
        "pipe_buffers": "activations received and sent, by buffer",
        "grad_layer": "gradients received from the next stage",
        "using_bf16_optimizer": "whether gradients are accumulated in fp32 by BF16_Optimizer",
        "dynamic_shape": "allowing other shapes in evaluation",
        "micro_batches": "allowing another number of micro-batches in evaluation",
        "reset_activation_shape": "exchanging shapes again after evaluation",
        "stage_id": "first stage: nothing is received",
        "timers": "resetting a timer that grows by two events per step",
    },
    f"{_PIPE}.dualpipev.DualPipeVEngine": {
        "_INSTRUCTION_MAP": "replaced: instructions of the DualPipeV schedule",
        "_exec_backward_pass": "backward pass of the loss, or of a single tensor",
        "_phase": "stage of the two that an instruction is for",
        "_phase1_buffer": "buffer of the second stage of a micro-batch",
        "_is_last_rank": "rank on which the first half of the schedule turns around",
        "_is_loss_stage": "stage that computes the loss",
    },
    f"{_PIPE}.module.PipelineModule": {
        "ds_pipe_replicated": "flag of weights that another stage counts in the gradient norm",
    },
}

_MUON: Names = {
    _STAGES_1_AND_2: {
        "get_flat_partition": "replaced: flat gradients, into which Muon writes its updates",
        "_apply_muon_updates_cpu_offload": "replaced: Muon's updates with offload",
        "all_grad_tensors": "gradients of all parameters of a group",
        "averaged_gradients": "gradients of this rank's partition of a group",
        "groups_lacking_loss_scale": "groups whose gradients Muon has replaced by updates",
        "unscale_and_clip_grads": "replaced: clipping of updates",
        "clip_grad": "clipping threshold",
        "_is_muon_group": "recognizing a group of matrices",
        "check_grad_overflow": "whether bf16 gradients are checked for overflow",
        "use_muon": "turning Muon's update off while gradients are flattened",
    },
    _STAGE_3: {
        "use_muon": "recognizing Muon",
        "_apply_muon_to_accumulated_grads": "replaced: Muon's updates",
        "sub_groups_lacking_loss_scale": "sub-groups whose gradients Muon has replaced by updates",
        "sub_groups_using_muon": "sub-groups of matrices",
        "unscale_and_clip_grads": "replaced: clipping of updates",
        "clip_grad": "clipping threshold",
        "offload_optimizer": "whether gradients are already unscaled",
    },
    f"{_ZERO}.muon.original_muon": {
        "muon_update": "replaced: Muon's update takes clipped gradients",
    },
}

REQUIRED: dict[str, Names] = {
    CONFIGURATION: _CONFIGURATION,
    TRAINING: {**_STATE, **_OPTIMIZERS, **_NVME, **_PIPELINE},
    MUON: _MUON,
}

DEEPSPEED = Dependency("deepspeed", ">=0.19.8,<0.20", REQUIRED)
