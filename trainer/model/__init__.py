"""Hugging Face models: building, weights, cost, export and generation."""

from transformers import PreTrainedModel

from trainer.model.build import build_from_description, build_model, check_model, load_model
from trainer.model.cost import ModelCost, model_cost, peak_flops, state_bytes
from trainer.model.export import describe_model, load_exported, write_model
from trainer.model.generate import generate_texts
from trainer.model.initialize import initialize_weights
from trainer.model.materialize import (
    PretrainedWeights,
    RandomWeights,
    WeightSource,
    ZeroWeights,
    configured_weights,
    materialize,
)
from trainer.model.output_head import returns_head_output
from trainer.model.parameter_options import WeightOptions, weight_options
from trainer.model.read import read_weights

__all__ = [
    "ModelCost",
    "PreTrainedModel",
    "PretrainedWeights",
    "RandomWeights",
    "WeightOptions",
    "WeightSource",
    "ZeroWeights",
    "build_from_description",
    "build_model",
    "check_model",
    "configured_weights",
    "describe_model",
    "generate_texts",
    "initialize_weights",
    "load_exported",
    "load_model",
    "materialize",
    "model_cost",
    "peak_flops",
    "read_weights",
    "returns_head_output",
    "state_bytes",
    "weight_options",
    "write_model",
]
