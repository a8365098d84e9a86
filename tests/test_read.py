"""Reading pretrained weights: quantized weights, unexpected keys, scalars, and non-finite values."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.configs import with_values
from tools.parity.families import FAMILIES, Family
from tools.parity.shrink import tiny as tiny_family
from trainer.config.load import check_config
from trainer.config.model_config import load_model_config
from trainer.errors import ConfigError
from trainer.model import build_model, check_model, configured_weights, materialize
from trainer.model.read import check_weight_headers, pretrained_weights, read_weights
from trainer.sharding import Shard, chunks_of_fragment, chunks_of_shard
from trainer.tensor_parallel import TensorMapper, model_region, resolve_plan

pytestmark = pytest.mark.fast

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, **tensors: Any) -> None:
    """Add or replace tensors in the only file of a folder; None removes one."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        state.pop(name, None) if tensor is None else state.update({name: tensor})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def shape_of(tiny: dict[str, Any], folder: Path, **values: Any) -> Any:
    """Build and check a model as a dry run and the start of a run do, before any process group."""
    loaded = check_config(with_values(tiny, model={"path": str(folder), **values}), world_size=1, device="cpu")
    model = build_model(loaded)
    check_model(model, loaded)
    return model


def model_from(tiny: dict[str, Any], folder: Path, **values: Any) -> Any:
    loaded = check_config(with_values(tiny, model={"path": str(folder), **values}), world_size=1, device="cpu")
    model = build_model(loaded)
    list(materialize(model, configured_weights(loaded)))
    return model


# --- quantized -------------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("values", "key", "method"),
    [
        ({"quantization_config": FP8}, "quantization_config", "fp8"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantization_config",
            "bitsandbytes",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config", "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config.quantization_config", "awq"),
    ],
)
def test_quantized_config_is_refused(
    values: dict[str, Any], key: str, method: str, tiny: dict[str, Any], folder: Path
) -> None:
    change_config(folder, **values)
    for allowed in (False, True):
        with pytest.raises(
            ConfigError, match=rf"^model\.path: .*config\.json: {key} has quant_method '{method}'"
        ) as raised:
            shape_of(tiny, folder, allow_unexpected_keys=allowed)
        assert "save_pretrained" in str(raised.value)


def test_random_initialization_ignores_quantization(tiny: dict[str, Any], folder: Path) -> None:
    change_config(folder, quantization_config=FP8)
    change_weights(folder, **{f"{DOWN}.weight_scale_inv": torch.ones(1, 1)})
    model = model_from(tiny, folder, initialize="random")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


PACKED: dict[str, dict[str, Any]] = {
    "float8": {f"{DOWN}.weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn)},
    "float8 with scales": {
        f"{DOWN}.weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn),
        f"{DOWN}.weight_scale_inv": torch.ones(1, 1),
    },
    "int8": {f"{DOWN}.weight": torch.zeros(32, 64, dtype=torch.int8)},
    "bitsandbytes": {
        f"{DOWN}.weight": torch.zeros(1024, 1, dtype=torch.uint8),
        f"{DOWN}.weight.absmax": torch.ones(32),
        f"{DOWN}.weight.quant_map": torch.ones(16),
        f"{DOWN}.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8),
    },
    "GPTQ": {
        f"{DOWN}.weight": None,
        **{f"{DOWN}.{key}": torch.ones(4, 4, dtype=torch.int32) for key in ("qweight", "qzeros", "g_idx")},
        f"{DOWN}.scales": torch.ones(4, 4),
    },
    "scales alone": {f"{DOWN}.weight_scale": torch.ones(32, 1)},
    "compressed-tensors": {f"{DOWN}.weight": None, f"{DOWN}.weight_packed": torch.ones(4, 4, dtype=torch.int32)},
    "key/value cache": {"model.layers.0.self_attn.k_scale": torch.ones(())},
}


@pytest.mark.parametrize("packed", PACKED)
def test_quantized_weights_without_config_entry_are_refused(packed: str, tiny: dict[str, Any], folder: Path) -> None:
    change_weights(folder, **PACKED[packed])
    for allowed in (False, True):
        with pytest.raises(ConfigError, match=r"model\.path: the weights in .* are quantized") as raised:
            shape_of(tiny, folder, allow_unexpected_keys=allowed)
        for key, tensor in PACKED[packed].items():
            odd = tensor is not None and (not key.endswith(".weight") or tensor.dtype not in (torch.float32,))
            assert not odd or key in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_unquantized_dtypes_are_loaded(dtype: torch.dtype, tiny: dict[str, Any], folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model_from(tiny, folder)
    for name, value in expected.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


# --- scalars, and every tensor of every family -----------------------------------------------------------------------


def meta_or_skip(family: Family) -> Any:
    """Its tiny model on the meta device."""
    try:
        config = tiny_family(family.model_type, **family.fields)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # gemma3n wants PIL; some assistants and musicgen have no tiny configuration
        return pytest.skip(f"no tiny model: {error}")


def randomized(family: Family) -> Any:
    """A tiny model in which no weight or persistent buffer has the value that its constructor gives it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_family(family.model_type, **family.fields))
    persistent = model.state_dict()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and name in persistent:
                tensor.copy_(torch.randn_like(tensor))
    return model


def differences(family: Family, folder: Path) -> list[str]:
    """Tensors in which our reading of a saved tiny model differs from `from_pretrained`."""
    randomized(family).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(str(folder)))
    read_weights(model, str(folder))
    expected = type(model).from_pretrained(folder, config=load_model_config(str(folder)), dtype=torch.float32)
    if family.model_type == "zaya":  # transformers 5.23 sets the last of these to -1 whatever the file says
        for name, buffer in (*model.named_buffers(), *expected.named_buffers()):
            if name.endswith("balancing_biases"):
                buffer[-1] = 0
    own, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, expected))
    assert own.keys() == theirs.keys()
    return [name for name, tensor in theirs.items() if not torch.equal(tensor, own[name])]


@pytest.mark.parametrize("family", [Family(name) for name in ("apertus", "gpt2", "olmoe", "zaya")], ids=str)
def test_all_tensors_equal_from_pretrained(family: Family, tmp_path: Path) -> None:
    assert not differences(family, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.task == "causal_lm"], ids=str)
def test_all_tensors_of_all_families_equal_from_pretrained(family: Family, tmp_path: Path) -> None:
    model = meta_or_skip(family)
    if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model.num_parameters() > 3e7:
        pytest.skip("its text model has no causal class of its own, or there is none so small")
    assert not differences(family, tmp_path)


def test_scalar_buffers_are_loaded_on_each_tensor_rank(tmp_path: Path) -> None:
    whole = randomized(Family("apertus"))
    whole.save_pretrained(tmp_path)
    scalars = {name: buffer for name, buffer in whole.named_buffers() if name.endswith((".beta", ".eps"))}
    assert all(buffer.ndim == 0 and buffer != 0 for buffer in scalars.values())
    for rank in range(2):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole.config)
        mapper = TensorMapper(
            model, resolve_plan(model, {}, 2, rank), model_region(model, None, 2, rank), lambda count: None
        )
        for parameters in pretrained_weights(model, str(tmp_path)):
            mapper.shard_parameters(parameters)
        assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in scalars.items())


def test_scalar_parameter_is_loaded(folder: Path) -> None:
    models = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            models.append(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)))
            models[-1].model.norm.register_parameter("gain", torch.nn.Parameter(torch.tensor(3.5)))
    models[0].save_pretrained(folder)
    read_weights(models[1], str(folder))
    assert float(models[1].model.norm.gain) == 3.5


def test_scalar_shard_round_trips() -> None:
    shard, full = Shard.full("gain", ()), torch.tensor(3.5)
    part = shard.extract(full)
    assert torch.equal(part, full)
    for pieces in (chunks_of_shard(part, shard), chunks_of_fragment(part.view(1), 0, shard)):
        assert [(start, float(piece)) for start, piece in pieces] == [((), 3.5)]
    again = torch.zeros(())
    shard.insert(part, again)
    assert torch.equal(again, full)


# --- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_with_name_file_and_count(
    value: float, tiny: dict[str, Any], folder: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight")[3, 5:8] = value
        model.model.norm.weight[0] = value
    model.save_pretrained(folder, max_shard_size="20KB")
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^model\.path: weights in .* are NaN or infinite \(got ") as raised:
        model_from(tiny, folder)
    assert f"{DOWN}.weight in {weights[f'{DOWN}.weight']}: 3 of 2048 values" in str(raised.value)
    assert f"model.norm.weight in {weights['model.norm.weight']}: 1 of 32 values" in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("mixtral", "model.layers.1.mlp.experts.down_proj"), ("apertus", "model.layers.1.mlp.act_fn.beta")],
)
def test_non_finite_experts_and_buffers_are_refused(model_type: str, key: str, tmp_path: Path) -> None:
    model = randomized(Family(model_type))
    with torch.no_grad():
        model.state_dict()[key].view(-1)[-1] = torch.nan
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        again = AutoModelForCausalLM.from_config(model.config)
    names = "experts.3.w2.weight" if model_type == "mixtral" else key
    with pytest.raises(ConfigError, match=rf"{names} in model\.safetensors: 1 of"):
        read_weights(again, str(tmp_path))


def test_non_finite_value_is_seen_by_owning_rank_only(tiny: dict[str, Any], folder: Path) -> None:
    """A negative control: without the exchange of what was found, the first rank would train on."""
    weight = load_file(folder / "model.safetensors")[f"{DOWN}.weight"]
    weight[0, -1] = torch.nan
    change_weights(folder, **{f"{DOWN}.weight": weight})
    loaded = check_config(
        with_values(tiny, model={"path": str(folder)}, parallel={"tensor": 2}), world_size=2, device="cpu"
    )
    for rank in range(2):
        model = build_model(loaded)
        mapper = TensorMapper(
            model, resolve_plan(model, {}, 2, rank), model_region(model, None, 2, rank), lambda count: None
        )
        try:
            for parameters in pretrained_weights(model, str(folder)):
                mapper.shard_parameters(parameters)
        except ConfigError:
            assert rank == 1
        else:
            assert rank == 0


# --- unexpected keys -------------------------------------------------------------------------------------------------


def test_unexpected_keys_are_refused_with_count_and_first_ten(tiny: dict[str, Any], folder: Path) -> None:
    keys = [f"model.layers.0.mlp.extra_{n:02}.weight" for n in range(12)]
    change_weights(folder, **{key: torch.ones(2) for key in keys})
    with pytest.raises(ConfigError, match=r"^model\.path: .* unexpected keys, .* \(got 12: ") as raised:
        shape_of(tiny, folder)
    assert all(key in str(raised.value) for key in keys[:10])
    assert keys[10] not in str(raised.value)
    assert "and 2 more" in str(raised.value)
    assert "model.allow_unexpected_keys" in str(raised.value)


@pytest.mark.parametrize("key", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_keys_contradicting_config_are_unexpected(key: str, tiny: dict[str, Any], folder: Path) -> None:
    """More layers than config.json says, or biases that it denies: no class of the family has them."""
    change_weights(folder, **{key: torch.ones(32)})
    with pytest.raises(ConfigError, match=r"unexpected keys, .* \(got 1: "):
        shape_of(tiny, folder)


def test_allowed_unexpected_keys_are_skipped(
    tiny: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = LlamaForCausalLM.from_pretrained(folder)
    change_weights(folder, **{"some.other.weight": torch.ones(2)})
    with caplog.at_level(logging.INFO, "trainer.model.read"):
        model = model_from(tiny, folder, allow_unexpected_keys=True)
    assert [line for line in caplog.messages if "skipped 1 keys (1 unexpected)" in line and "some.other" in line]
    for name, value in expected.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def bert(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        is_decoder=True,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertForPreTraining(config).save_pretrained(folder)
    return folder


def family_folder(model_type: str, folder: Path, *more: str, **fields: Any) -> Path:
    model = AutoModelForCausalLM.from_config(tiny_family(model_type, **fields))
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {key: torch.ones(2) for key in more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SKIPPED = {
    "another task's head, a pooler": (bert, "bert.pooler.dense.weight", "cls.seq_relationship.weight"),
    "a sequence classifier's head": (lambda f: family_folder("llama", f, "score.weight"), "score.weight"),
    "next-token layers that the family skips": (
        lambda f: family_folder("qwen3_next", f, "mtp.layers.0.mlp.gate.weight"),
        "mtp.layers.0.mlp.gate.weight",
    ),
    "next-token layers after the last": (
        lambda f: family_folder("deepseek_v3", f, "model.layers.4.enorm.weight", num_nextn_predict_layers=1),
        "model.layers.4.enorm.weight",
    ),
    "old constants": (lambda f: family_folder("llama", f, "model.layers.0.self_attn.rotary_emb.inv_freq"), "inv_freq"),
    "old masks": (lambda f: family_folder("gpt_neo", f, "transformer.h.0.attn.attention.masked_bias"), "masked_bias"),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_keys_of_other_classes_are_skipped_with_one_log_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, *keys = SKIPPED[kind]
    folder = make(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(str(folder)))
    with caplog.at_level(logging.INFO, "trainer.model.read"):
        check_weight_headers(model, str(folder))
        read_weights(model, str(folder))
    (line,) = [line for line in caplog.messages if "skipped" in line]
    assert all(key in line for key in keys)
    assert "unexpected" not in line


def test_mask_and_bias_of_same_name_are_distinguished(tmp_path: Path) -> None:
    folder, key = family_folder("gptj", tmp_path), "transformer.h.0.attn.bias"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(str(folder)))
    change_weights(folder, **{key: torch.ones(1, 1, 8, 8, dtype=torch.uint8)})
    check_weight_headers(model, str(folder))
    change_weights(folder, **{key: torch.ones(64)})
    with pytest.raises(ConfigError, match=r"unexpected keys, .* \(got 1: "):
        check_weight_headers(model, str(folder))


def classes_of(model: Any) -> list[Any]:
    """The classes in the family's own file that are built from the same configuration."""
    kinds = [kind for kind in vars(sys.modules[type(model).__module__]).values() if isinstance(kind, type)]
    models = [
        kind for kind in kinds if issubclass(kind, PreTrainedModel) and not kind.__name__.endswith("PreTrainedModel")
    ]
    return [kind for kind in models if kind.config_class is type(model.config)]


def false_errors(family: Family, folder: Path) -> tuple[int, list[str]]:
    """Saves tiny models of every class of a family, reads the keys of each as the causal model's.

    Returns:
        How many folders there were, and what was refused.
    """
    config = tiny_family(family.model_type, **family.fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > 3e7:
        return 0, []
    count, refused = 0, []
    for kind in classes_of(model):
        try:
            kind(model.config).save_pretrained(folder / kind.__name__)
            with torch.device("meta"):
                causal = AutoModelForCausalLM.from_config(load_model_config(str(folder / kind.__name__)))
        except Exception:  # a class that wants more than its configuration; emu3's text model has no causal class
            continue
        count += 1
        try:
            check_weight_headers(causal, str(folder / kind.__name__))
        except ConfigError as error:
            refused.append(f"{kind.__name__}: {error}")
    return count, refused


FEW = [Family(name) for name in ("llama", "gpt2", "bert", "bart", "mixtral", "deepseek_v3", "gemma3")]


@pytest.mark.parametrize("family", FEW, ids=str)
def test_no_class_of_family_has_unexpected_keys(family: Family, tmp_path: Path) -> None:
    count, refused = false_errors(family, tmp_path)
    assert count >= 2
    assert not refused


@pytest.mark.matrix
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.task == "causal_lm"], ids=str)
def test_no_class_of_any_family_has_unexpected_keys(family: Family, tmp_path: Path) -> None:
    meta_or_skip(family)
    assert not false_errors(family, tmp_path)[1]


@pytest.mark.parametrize("same", [True, False])
def test_differing_tied_weights_are_refused(folder: Path, same: bool) -> None:
    change_config(folder, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, **{"lm_head.weight": embedding.clone() if same else embedding + 0.001})
    config = load_model_config(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if same:
        read_weights(model, str(folder))
        assert torch.equal(model.lm_head.weight, embedding)
    else:
        with pytest.raises(ConfigError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' in .* different"):
            read_weights(model, str(folder))
