"""Supported versions of transformers, and the internal names in use."""

from __future__ import annotations

from trainer.compat.dependency_check import Dependency, Names

CONFIGURATION, MODEL = "configuration", "model"

_LOADING = "transformers.core_model_loading"

_CONFIGURATION: Names = {
    "transformers.configuration_utils.PreTrainedConfig": {
        "_decode_special_floats": "reading infinity, which config.json encodes as an object",
    },
}

_MODEL: Names = {
    "transformers.modeling_utils.PreTrainedModel": {
        "_supports_sdpa": "choosing the default attention implementation",
        "_init_weights": "random weights by the rules of the family, one module at a time",
        "_is_hf_initialized": "flag of parameters that initialization must not change: shared ones are set once",
        "_tp_plan": "tensor-parallel plan of the output embeddings",
        "_keys_to_ignore_on_save": "tensors that the family leaves out of its files",
        "_keys_to_ignore_on_load_missing": "parameters that the family computes when they are missing",
        "_keys_to_ignore_on_load_unexpected": "keys that the family skips, which are not refused as unexpected",
        "all_tied_weights_keys": "names of tied weights that are not stored",
    },
    "transformers.configuration_utils.PreTrainedConfig": {
        "_attn_implementation": "attention implementation in use, restored after a trace with another one",
    },
    "transformers.conversion_mapping": {
        "get_model_conversion_mapping": "rules between the names in files and those of the model",
    },
    _LOADING: {
        "_weight_conversions": "rules by which loaded weights were converted, which saving reverts",
        "WeightConverter": "rule that makes tensors of the model out of several in the files",
        "WeightRenaming": "rule that renames a tensor",
        "WeightTransform": "base of both rules",
        "PrefixChange": "rule for models inside models, not reverted for a model that was not loaded",
        "MergeModulelist": "operation that stacks experts, whose chunks are read in place",
        "Concatenate": "operation that joins gate and up projections, whose chunks are read in place",
        "rename_source_key": "matching a key in the files with a tensor of the model",
        "revert_weight_conversion": "tensors under the names and in the shapes of the files",
        "dot_natural_key": "order in which converters expect keys",
    },
    f"{_LOADING}.WeightTransform": {
        "add_tensor": "source of a converter",
        "was_used": "whether a rule matched, so that saving reverts it",
        "source_patterns": "patterns of the keys that a converter takes",
    },
    f"{_LOADING}.WeightConverter": {
        "convert": "running a converter",
        "operations": "recognizing converters that only stack",
    },
    "transformers.initialization": {
        "TORCH_INIT_FUNCTIONS": "torch's initializers, replaced while modules are surveyed on the meta device",
        "guard_torch_init_functions": "initializers that skip parameters marked as initialized",
    },
}

REQUIRED: dict[str, Names] = {CONFIGURATION: _CONFIGURATION, MODEL: _MODEL}

TRANSFORMERS = Dependency("transformers", ">=5.17,<5.24", REQUIRED)
