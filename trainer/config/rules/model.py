"""Rules about the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.causal_attention import NON_CAUSAL_FAMILIES
from trainer.config.model_facts import ModelFacts
from trainer.config.rules.registry import rule, rule_reading
from trainer.config.schema import DataSection, ModelSection
from trainer.config.tasks import TASK_FAMILIES
from trainer.errors import Problem


@rule
def model_is_path_or_config(model: ModelSection) -> Iterator[Problem]:
    if (model.path is None) == (model.config is None):
        count = "neither" if model.path is None else "both"
        yield Problem("model", f"either 'path' or 'config' is required (got {count})", "Set one of them")
    if model.path is None and model.initialize == "pretrained":
        yield Problem(
            "model.initialize",
            "'pretrained' requires weights, which an inline 'config' does not have",
            "Set model.path, or initialize to 'random'",
        )


@rule
def model_family_is_causal(model: ModelSection, facts: ModelFacts) -> Iterator[Problem]:
    family, task = facts.model_type, TASK_FAMILIES[model.task]
    if task.is_causal and family in NON_CAUSAL_FAMILIES:
        key = "model.config.model_type" if model.path is None else "model.path"
        reason = f"'{family}' sees later tokens, so it cannot be trained as a {task.noun}: it "
        yield Problem(key, reason + NON_CAUSAL_FAMILIES[family], "Take another family")


@rule
def weights_are_safetensors(model: ModelSection) -> Iterator[Problem]:
    folder = Path(model.path or "").expanduser()
    if model.path is None or model.initialize == "random" or not (folder / "config.json").is_file():
        return
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        content = f"only {', '.join(pickles)}, which can run code when read" if pickles else "no weights"
        yield Problem(
            "model.path",
            f"'{model.path}' holds no *.safetensors, {content}",
            "Convert the weights with `save_pretrained`, or set model.initialize to 'random'",
        )


@rule_reading("data.sequence_length")
def sequence_length_fits_model(data: DataSection, facts: ModelFacts) -> Iterator[Problem]:
    key, length = "data.sequence_length", data.sequence_length
    if facts.max_positions and length > facts.max_positions:
        yield Problem(
            key,
            f"must be at most {facts.max_positions}, the positions of the model (got {length})",
            "Lower it, or raise max_position_embeddings in model.config",
        )
    if facts.required_length and length != facts.required_length:
        yield Problem(
            key,
            f"must be {facts.required_length}, the product of axial_pos_shape, which {facts.model_type} is trained on "
            f"(got {length})",
            "Change one of them, or set axial_pos_embds in model.config to false",
        )
