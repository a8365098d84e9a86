"""Rules about the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.model_facts import NON_CAUSAL_FAMILIES
from trainer.config.rules.registry import Draft, rule
from trainer.config.tasks import TASK_FAMILIES
from trainer.errors import Problem


@rule("model")
def model_is_path_or_config(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    if (draft.model.path is None) == (draft.model.config is None):
        found = "neither" if draft.model.path is None else "both"
        yield Problem("model", f"either 'path' or 'config' says what the model is; {found} is given")
    if draft.model.path is None and draft.model.initialize == "pretrained":
        yield Problem(
            "model.initialize",
            "'pretrained' needs weights, and an inline 'config' has none",
            "Set model.path, or initialize to 'random'",
        )


@rule("model")
def model_family_is_causal(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    family = draft.facts.model_type if draft.facts else None
    if family in NON_CAUSAL_FAMILIES and TASK_FAMILIES[draft.model.task].is_causal:
        where = "model.config.model_type" if draft.model.path is None else "model.path"
        noun, reason = TASK_FAMILIES[draft.model.task].noun, NON_CAUSAL_FAMILIES[family]
        problem = f"'{family}' sees later tokens, so it cannot be trained as a {noun}: it {reason}"
        yield Problem(where, problem, "Take another family")


@rule("model")
def weights_are_safetensors(draft: Draft) -> Iterator[Problem]:
    assert draft.model is not None
    folder = Path(draft.model.path or "").expanduser()
    if draft.model.path is None or draft.model.initialize == "random" or not (folder / "config.json").is_file():
        return
    if not list(folder.glob("*.safetensors")):
        others = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
        found = f"only {', '.join(others)}, which can run code when read" if others else "no weights"
        yield Problem(
            "model.path",
            f"'{draft.model.path}' holds no *.safetensors, {found}",
            "Convert the weights with `save_pretrained`, or set model.initialize to 'random'",
        )


@rule("model", "data.sequence_length")
def sequence_length_fits_model(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    if draft.facts and draft.facts.max_positions and draft.data.sequence_length > draft.facts.max_positions:
        yield Problem(
            "data.sequence_length",
            f"{draft.data.sequence_length} is longer than the {draft.facts.max_positions} positions of the model",
            "Shorten it, or raise max_position_embeddings in model.config",
        )
    required_length = draft.facts.required_length if draft.facts else None
    if draft.facts and required_length and draft.data.sequence_length != required_length:
        yield Problem(
            "data.sequence_length",
            f"must be {required_length}, the product of axial_pos_shape, which {draft.facts.model_type} is trained on "
            f"(got {draft.data.sequence_length})",
            "Change one of them, or set axial_pos_embds in model.config to false",
        )
