"""From a model's configuration to the plain numbers that the rules need. Reads config.json only, never weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.checkpoint_format import MANIFEST, is_checkpoint, read_manifest
from trainer.config.model_sizes import relation_problems, size_problems
from trainer.config.paths import refuse_special_files
from trainer.config.tasks import DEFAULT_TASK, TASK_FAMILIES
from trainer.errors import CheckpointError, ConfigError, Problem, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from trainer.config.schema import ModelSection

DANGEROUS_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config")
"""Keys of a config.json that name code to fetch and run, or that change what the weights are."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys by which a config.json says that its weights are quantized: transformers', an older name of
compressed-tensors', and MLX's."""

DANGEROUS_PREFIXES = ("_attn_implementation", "_experts_implementation", "_name_or_path")


def scrub(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` without the keys, at any depth, by which a config.json can have code run (CVE-2026-4372)."""
    return {
        key: scrub(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in DANGEROUS_KEYS and not key.startswith(DANGEROUS_PREFIXES)
    }


@dataclass(frozen=True)
class ModelFacts:
    """What rules ask of a model."""

    model_type: str
    vocabulary_size: int
    hidden_size: int | None
    """None for the few families that have no single one."""

    max_positions: int | None
    """Longest sequence the model was made for; None where it has no such bound."""

    attention_heads: int | None
    """Attention heads, of layers that differ the greatest common divisor; None where the configuration says none."""

    required_length: int | None = None
    """The one sequence length that the model can be trained on; None for nearly all families."""

    special_token_ids: frozenset[int] = frozenset()
    """Token ids that the configuration names: end of text, padding, an image's place."""

    causal_setting: tuple[str, Any] | None = None
    """The configuration key that is not set for causal attention, and the value that it should have; None where the
    family has no such key, or it is set."""

    min_block_sparse_length: int = 0
    """Sequences shorter than this turn off block-sparse attention for good (BigBird)."""

    has_load_balancing_loss: bool = False
    """Whether the family adds a load-balancing loss of its mixture, which counts tokens."""


def _config_class(raw: Mapping[str, Any], where: str, task: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = raw.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(Problem(f"{where}.model_type", f"expected a model type, got {name!r}", 'For example "llama"'))
    if name not in CONFIG_MAPPING:
        hint = suggest(name, CONFIG_MAPPING.keys())
        remedy = "" if hint else "If a package of yours registers it, name the package in run.plugins (its code runs)"
        raise ConfigError(Problem(f"{where}.model_type", f"transformers knows no model type '{name}'{hint}", remedy))
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[name]
    if config_class not in _model_classes(task):
        raise ConfigError(
            Problem(
                f"{where}.model_type",
                f"'{name}' has no {TASK_FAMILIES[task].noun} in transformers",
                TASK_FAMILIES[task].remedy,
            )
        )
    return config_class


def _model_classes(task: str) -> Mapping[type[PreTrainedConfig], Any]:
    """Model class by configuration class. A lookup imports the code of that family only."""
    from transformers.models.auto import modeling_auto

    classes: Mapping[type[PreTrainedConfig], Any] = getattr(modeling_auto, TASK_FAMILIES[task].mapping)
    return classes


def _unknown_keys(raw: Mapping[str, Any], config_class: type[PreTrainedConfig], where: str) -> Iterator[Problem]:
    fields = (
        {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    )
    known = (
        fields
        | set(config_class().to_dict())
        | set(config_class.attribute_map)
        | {"model_type", "architectures", "dtype"}
    )
    known |= {"output_router_logits", "rope_theta", "rope_scaling", "partial_rotary_factor", "initializer_range"}
    for key in raw:
        if key not in known:
            reason = f"unknown key for model type '{config_class.model_type}'{suggest(key, known)}"
            yield Problem(f"{where}.{key}", reason)


def _inline_config(raw: Mapping[str, Any], task: str) -> PreTrainedConfig:
    where = "model.config"
    dangerous = sorted(set(raw) - set(scrub(raw)))
    if dangerous:
        raise ConfigError(Problem(f"{where}.{key}", "not taken from a configuration", "Remove it") for key in dangerous)
    config_class = _config_class(raw, where, task)
    try:
        problems = list(_unknown_keys(raw, config_class, where))
    except Exception:  # a family whose configuration has no defaults: its constructor says what is missing
        problems = []
    if problems:
        raise ConfigError(problems)
    return _construct(config_class, raw, where)


def _construct(config_class: type[PreTrainedConfig], raw: Mapping[str, Any], where: str) -> PreTrainedConfig:
    if problems := list(size_problems(raw, where)):
        raise ConfigError(problems)
    config = _constructed(config_class, raw, where)
    if problems := list(relation_problems(config, raw, where)):
        raise ConfigError(problems)
    return config


def _constructed(config_class: type[PreTrainedConfig], raw: Mapping[str, Any], where: str) -> PreTrainedConfig:
    try:
        return config_class.from_dict(
            config_class._decode_special_floats(dict(raw))
        )  # infinity, which JSON has no number for
    except Exception as error:  # the families' own validators raise what they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        field = next((line.split("'")[1] for line in lines if line.startswith("Validation error for field")), "")
        raise ConfigError(
            Problem(f"{where}.{field}" if field else where, lines[-1] if lines else type(error).__name__)
        ) from None


def _recipe_in(folder: Path) -> Mapping[str, Any]:
    try:
        recipe: Mapping[str, Any] = read_manifest(folder).model["config"]
    except CheckpointError as error:
        raise ConfigError(Problem("model.path", str(error), "Give another checkpoint")) from None
    return recipe


def load_model_config(path: str, task: str = DEFAULT_TASK, *, weights_are_read: bool = False) -> PreTrainedConfig:
    """The configuration in a model folder, a checkpoint, or a repository on the hub.

    Args:
        task: `model.task`, which must have a model for it.
        weights_are_read: refuse it where it says that the weights beside it are quantized. With random weights that
            does not matter.

    Raises:
        ConfigError: if there is none, or transformers does not take it.
    """
    from transformers import PreTrainedConfig

    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ConfigError(Problem("model.path", f"'{path}' does not exist", "Give a folder or a name on the hub"))
    refuse_special_files(folder, "model.path")
    if is_checkpoint(folder):
        return parse_model_config(_recipe_in(folder), f"{path}/{MANIFEST}", task)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            Problem("model.path", f"'{path}' holds no config.json", "Give a Hugging Face model folder or a checkpoint")
        )
    try:
        raw, _ = PreTrainedConfig.get_config_dict(str(folder) if folder.is_dir() else path)
    except Exception as error:  # network, hub and JSON errors alike
        lines = str(error).strip().splitlines()
        cause = lines[0].rstrip(".") if lines else type(error).__name__
        place = "" if folder.is_dir() else f"is not a folder in {Path.cwd()}, and as a name on the hub it "
        raise ConfigError(
            Problem(
                "model.path", f"'{path}' {place}cannot be read: {cause}", "Check the name, the network, or the folder"
            )
        ) from None
    if weights_are_read and (found := _quantization_method(raw)) is not None:
        where, method = found
        raise ConfigError(
            Problem(
                "model.path",
                f"the weights in '{path}' are quantized, and only unquantized ones can be trained "
                f"({path}/config.json: {where} says {method})",
                "Dequantize the model and save it with `save_pretrained`, or use the unquantized repository; with "
                "model.initialize 'random' only the sizes are used",
            )
        )
    return parse_model_config(raw, f"{path}/config.json", task)


def _quantization_method(raw: Mapping[str, Any], where: str = "") -> tuple[str, str] | None:
    """(key, method) by which a configuration says at any depth that its weights are quantized; None if it does not."""
    for key, value in raw.items():
        path = f"{where}.{key}" if where else key
        if key in QUANTIZATION_KEYS and value:
            method = value.get("quant_method", value.get("quant_algo")) if isinstance(value, Mapping) else value
            return path, f"quant_method {method!r}" if method else "no quant_method"
        if isinstance(value, Mapping) and (found := _quantization_method(value, path)) is not None:
            return found
    return None


def parse_model_config(raw: Mapping[str, Any], where: str, task: str = DEFAULT_TASK) -> PreTrainedConfig:
    """The configuration in a stored model, without what could run code.

    Args:
        where: it was found.
        task: `model.task`, which must have a model for it.

    Raises:
        ConfigError: for an unknown type, or a value that the type does not take.
    """
    clean = scrub(raw)
    return _construct(_config_class(clean, where, task), clean, where)


def model_config(section: ModelSection) -> PreTrainedConfig:
    """The Hugging Face configuration of the model, without anything that could run code.

    Raises:
        ConfigError: for a folder without config.json, an unknown type, a key or value the type does not take.
    """
    if section.config is not None:
        config = _inline_config(section.config, section.task)
    else:
        assert section.path is not None
        config = load_model_config(section.path, section.task, weights_are_read=section.initialize != "random")
    config.use_cache = False
    return config


NON_CAUSAL_FAMILIES: dict[str, str] = {
    "cpmant": "takes all tokens of a sample for context, which is seen in both directions",
    "prophetnet": "mixes positions in its n-gram attention, by a reshape",
    "xlnet": "attends in both directions unless it is given a permutation",
}
"""Families whose causal class sees later tokens with every configuration, and how. The causality probe would notice
most of them only once they are trained; `tools/parity` proves that there are no others."""

_SWITCHES = ("is_decoder", "causal")
"""Keys that make the attention of an encoder family causal if true: BERT and its kin, XLM. They default to false."""


def causal_switch(model_type: object) -> str | None:
    """The configuration key that makes a family's attention causal if true; None for a family without one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    config_class: Any = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    return next((key for key in _SWITCHES if key in fields), None)


def make_causal(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set the attention of a model that is trained as a causal language model to causal, in place.

    Changes the families that have a switch for it (`causal_switch`); the others are causal by themselves, or never.
    """
    if switch := causal_switch(config.model_type):
        setattr(config, switch, True)
    return config


def with_causal_attention(section: ModelSection) -> ModelSection:
    """The section with the family's `causal_switch` in `config`, unless it is set there.

    A folder (`path`) is taken as it is: its weights were trained with its own attention.
    """
    raw = section.config if TASK_FAMILIES[section.task].is_causal else None
    switch = None if raw is None else causal_switch(raw.get("model_type"))
    if raw is None or switch is None or switch in raw:
        return section
    return section.model_copy(update={"config": {**raw, switch: True}})


def _causal_setting(config: PreTrainedConfig) -> tuple[str, Any] | None:
    switch = causal_switch(config.model_type)
    if switch and not getattr(config, switch):
        return switch, True
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "use_bidirectional_attention", False
    if getattr(config, "attention_type", None) == "block_sparse":
        return "attention_type", "original_full"
    if "lsh" in (layers := getattr(config, "attn_layers", None) or ()):  # later tokens move the borders of its chunks
        return "attn_layers", ["local"] * len(layers)
    return None


def _special_token_ids(config: PreTrainedConfig) -> frozenset[int]:
    ids: set[int] = set()
    for key, value in {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}.items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            ids.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    return frozenset(ids)


def _min_block_sparse_length(config: PreTrainedConfig) -> int:
    if config.model_type != "big_bird" or getattr(config, "attention_type", None) != "block_sparse":
        return 0
    return int((5 + 2 * config.num_random_blocks) * config.block_size) + 1


def default_attention(config: PreTrainedConfig, task: str) -> Literal["sdpa", "eager"]:
    """`sdpa` where the family has it. Imports the family's code, so it is asked for a run and not for a check."""
    model_class = _model_classes(task)[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def _heads(config: PreTrainedConfig) -> list[int]:
    """Attention heads: one number, or one for each layer where layers differ."""
    try:
        heads = getattr(config, "num_attention_heads", None)
    except Exception:  # transformers refuses to read from the whole what differs between layers
        heads = [getattr(layer, "num_attention_heads", None) for layer in config.per_layer_config]
    found = heads if isinstance(heads, list | tuple) else [heads]
    return [number for number in found if isinstance(number, int) and number > 0]


def model_facts(config: PreTrainedConfig) -> ModelFacts:
    """The numbers of `config` that rules ask for.

    Raises:
        ConfigError: if it has no vocabulary.
    """
    text = config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(
            Problem("model", f"the configuration of '{config.model_type}' says no vocab_size", "Take another family")
        )
    hidden = getattr(text, "hidden_size", None)
    positions = getattr(text, "max_position_embeddings", None)
    axes = getattr(text, "axial_pos_shape", None) if getattr(text, "axial_pos_embds", False) else None
    return ModelFacts(
        model_type=str(config.model_type),
        vocabulary_size=vocabulary,
        hidden_size=hidden if isinstance(hidden, int) else None,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        attention_heads=math.gcd(*_heads(text)) or None,
        required_length=math.prod(axes) if axes else None,
        special_token_ids=_special_token_ids(config),
        causal_setting=_causal_setting(config),
        min_block_sparse_length=_min_block_sparse_length(config),
        has_load_balancing_loss=bool(getattr(text, "output_router_logits", False)),
    )
