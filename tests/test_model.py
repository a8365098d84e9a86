"""Building, initializing, the loss, the cost, and writing back."""

from __future__ import annotations

import inspect
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.configs import with_values
from tests.harness import run_ranks
from tools.bench.common import inline
from tools.parity.families import FAMILIES, Family
from tools.parity.gradient_proof import CLASSES, reference_model
from tools.parity.shrink import tiny as tiny_family
from trainer.config.load import check_config
from trainer.errors import ConfigError
from trainer.model import (
    build_from_description,
    build_model,
    configured_weights,
    describe_model,
    initialize_weights,
    load_exported,
    materialize,
    model_cost,
    peak_flops,
    write_model,
)
from trainer.model.initialize import random_weights
from trainer.model.read import pretrained_weights
from trainer.sharding import shard_of
from trainer.sharding.remote import make_remote
from trainer.tasks import TASKS, TaskLoss, TaskModule, auxiliary_coefficient
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel import TensorMapper, model_region, resolve_plan

pytestmark = pytest.mark.fast

LOCAL: dict[str, Any] = {"world_size": 1, "device": "cpu"}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
}
OPENAI = {"model_type": "openai-gpt", "vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}


def built(tiny: dict[str, Any], **values: Any) -> Any:
    loaded = check_config(with_values(tiny, **values), world_size=1, device="cpu")
    return build_model(loaded)


def initialized_model(tiny: dict[str, Any], seed: int = 1, **values: Any) -> Any:
    model = built(tiny, **values)
    initialize_weights(model, seed)
    return model


def test_built_model_is_on_meta_device(tiny: dict[str, Any]) -> None:
    model = built(tiny)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", [None, GPT2, MIXTRAL, OPENAI], ids=["llama", "gpt2", "mixtral", "openai-gpt"])
def test_initialization_has_family_distribution_and_depends_on_seed_only(config: Any, tiny: dict[str, Any]) -> None:
    values: dict[str, Any] = {} if config is None else {"model__config": config}
    first, again, other = (
        initialized_model(tiny, 1, **values),
        initialized_model(tiny, 1, **values),
        initialized_model(tiny, 2, **values),
    )
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(first.config)
    buffers = dict(plain.named_buffers())
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name
        expected = plain.get_parameter(name).detach()
        value = value.detach()
        if expected.std() == 0:
            assert torch.equal(value, expected), name
        elif value.numel() > 500:
            assert value.std() == pytest.approx(float(expected.std()), rel=0.15), name
            assert not torch.equal(value, other.get_parameter(name)), name


def test_module_values_do_not_depend_on_earlier_modules(tiny: dict[str, Any]) -> None:
    """Every layout can initialize its shards only: with more layers before, a layer has the same values."""
    small, large = initialized_model(tiny), initialized_model(tiny, model__config__num_hidden_layers=3)
    for name, value in small.named_parameters():
        assert torch.equal(value, large.get_parameter(name)), name


def test_initialization_yields_full_blocks_and_each_parameter_once(tiny: dict[str, Any]) -> None:
    model = built(tiny, model__config=GPT2)
    handed = list(random_weights(model, 1))
    everything = [p for group in handed for p in group]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert max(len(group) for group in handed) == len(list(model.transformer.h[0].parameters()))


def family_shape(family: Family, **fields: Any) -> Any:
    """Its tiny model on the meta device; None where there is none so small."""
    try:
        config = tiny_family(family.model_type, **family.fields, **fields)
        with torch.device("meta"):
            model = CLASSES[family.task].from_config(config)
    except Exception:
        return None
    return model if sum(parameter.numel() for parameter in model.parameters()) < 3e7 else None


def initialize_parameters(model: Any, complete: Any = lambda parameters: None) -> dict[str, torch.Tensor]:
    for parameters in random_weights(model, 1):
        complete(parameters)
    return dict(model.named_parameters())


SETS_BELOW = [
    Family("gemma3"),
    Family("git"),
    Family("modernbert", "masked_lm"),
    Family("t5", "seq2seq_lm"),
    Family("xlm", fields={"sinusoidal_embeddings": True}),
]
"""Families whose modules set weights of modules below them."""


@pytest.mark.parametrize("families", [SETS_BELOW, pytest.param(FAMILIES, marks=pytest.mark.matrix)], ids=["few", "all"])
def test_initialization_yields_final_values(families: list[Family]) -> None:
    """A consumer that takes parameters away, as ZeRO-3 does, receives the values that one process ends up with."""
    compared = 0
    for family in families:
        taken: dict[int, torch.Tensor] = {}

        def take(parameters: list[torch.nn.Parameter], taken: dict[int, torch.Tensor] = taken) -> None:
            for parameter in parameters:
                taken.setdefault(id(parameter), parameter.detach().clone())
                parameter.data = torch.empty(0)

        whole, other = family_shape(family), family_shape(family)
        if whole is None:
            continue
        expected, names = initialize_parameters(whole), initialize_parameters(other, take)
        assert [name for name, p in names.items() if not taken[id(p)].equal(expected[name])] == [], str(family)
        compared += 1
    assert compared > 0.8 * len(families)


def test_initializer_that_reads_values_is_yielded_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose rule reads a number of a weight that it sets from above."""
    rule = LlamaForCausalLM._init_weights

    def reads(self: Any, module: torch.nn.Module) -> None:
        rule(self, module)
        if isinstance(module, LlamaForCausalLM):
            module.lm_head.weight.fill_(module.lm_head.weight.mean().item())

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", reads)
    test_initialization_yields_final_values([Family("llama")])


def test_stage_initializes_local_weights_as_full_model_does() -> None:
    """GIT sets the weights of two embeddings one after the other, when it comes to the module above them."""
    whole, stage = family_shape(Family("git")), family_shape(Family("git"))
    first = stage.git.image_encoder.vision_model.embeddings.patch_embedding
    make_remote(first, "weight")
    expected, found = initialize_parameters(whole), initialize_parameters(stage)
    assert expected.keys() - found.keys() == {"git.image_encoder.vision_model.embeddings.patch_embedding.weight"}
    assert [name for name in found if not found[name].equal(expected[name])] == []
    assert first.weight.is_meta


def test_tied_weights_remain_one_parameter(tiny: dict[str, Any]) -> None:
    model = initialized_model(tiny, model__config__tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def task_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> TaskLoss:
    loss: TaskLoss = TaskModule(model, TASKS["causal_lm"], VocabularyCrossEntropy())(labels, input_ids=ids)
    return loss


def test_causal_lm_loss_equals_hugging_face(tiny: dict[str, Any]) -> None:
    model = initialized_model(tiny).eval()
    ids = torch.randint(0, 320, (3, 17))
    loss = task_loss(model, ids[:, :-1], ids[:, 1:])
    expected = model(input_ids=ids, labels=ids).loss
    assert float(loss.loss_sum) / (3 * 16) == pytest.approx(float(expected), rel=1e-6)
    assert float(loss.auxiliary) == 0


def test_ignored_labels_do_not_contribute_to_loss(tiny: dict[str, Any]) -> None:
    model = initialized_model(tiny).eval()
    ids, labels = torch.randint(0, 320, (1, 9)), torch.full((1, 9), -100)
    labels[0, 4] = 7
    loss = task_loss(model, ids, labels)
    logits = model(input_ids=ids).logits
    assert float(loss.loss_sum) == pytest.approx(float(F.cross_entropy(logits[0, 4:5], torch.tensor([7]))), rel=1e-6)


def test_load_balancing_loss_is_reported_as_auxiliary(tiny: dict[str, Any]) -> None:
    model = initialized_model(tiny, model__config=MIXTRAL).eval()
    ids = torch.randint(0, 320, (2, 9))
    loss = task_loss(model, ids[:, :-1], ids[:, 1:])
    output = model(input_ids=ids[:, :-1], output_router_logits=True)
    assert float(loss.auxiliary) == pytest.approx(float(output.aux_loss) * model.config.router_aux_loss_coef, rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementation_is_used(attention: str, tiny: dict[str, Any]) -> None:
    assert built(tiny, model__attention=attention).config._attn_implementation == attention


@pytest.mark.parametrize(("family", "expected"), [("llama", "sdpa"), ("gptj", "eager")])
def test_attention_default_is_best_supported(family: str, expected: str, tiny: dict[str, Any]) -> None:
    config = {
        "model_type": family,
        "vocab_size": 320,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_size": 32,
    }
    loaded = check_config(
        with_values(tiny, model__config={**config, "rotary_dim": 4} if family == "gptj" else config), **LOCAL
    )
    assert loaded.resolved()["model"]["attention"] == expected
    assert build_model(loaded).config._attn_implementation == expected


def test_unavailable_attention_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: 'flash_attention_2' cannot be used"):
        built(tiny, model__attention="flash_attention_2")


COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "ffn_config.moe_loss_weight")
BALANCED = [family for family in FAMILIES if family.task == "causal_lm" and not family.variant]


def auxiliary_loss_of_family(family: Family, coefficient: float) -> tuple[float, float] | None:
    """Return what the family's own loss adds to the cross entropy for a coefficient, which ours must read as well.

    Returns:
        (load-balancing loss, what is added for it); None for a family without one.
    """
    try:
        config = tiny_family(family.model_type, **family.fields)
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config))
    except Exception:  # there is no tiny model
        return None
    if "aux_loss" not in inspect.getsource(model_class.forward):
        return None
    text = config.get_text_config(decoder=True)
    for path in COEFFICIENTS:
        *parents, last = path.split(".")
        holder = text if not parents else getattr(text, parents[0], None)
        if hasattr(holder, last):
            setattr(holder, last, coefficient)
    for part in (config, text):
        part.output_router_logits = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 200, (2, 16))
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, use_cache=False)
    if not isinstance(getattr(output, "aux_loss", None), torch.Tensor):
        return None
    assert auxiliary_coefficient(model.config) == coefficient
    own = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return float(output.aux_loss), float(output.loss - own)


@pytest.mark.parametrize("family", [Family(name) for name in ("dbrx", "mixtral", "jetmoe")], ids=str)
def test_auxiliary_coefficient_equals_family(family: Family) -> None:
    found = auxiliary_loss_of_family(family, 0.37)
    assert found is not None
    assert found[1] == pytest.approx(0.37 * found[0], rel=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("family", BALANCED, ids=str)
def test_auxiliary_coefficient_equals_family_for_all(family: Family) -> None:
    found = auxiliary_loss_of_family(family, 0.37)
    if found is None:
        pytest.skip("no load-balancing loss")
    assert found[1] == pytest.approx(0.37 * found[0], rel=1e-4)


def test_model_cost_of_llama_equals_arithmetic(tiny: dict[str, Any]) -> None:
    cost = model_cost(built(tiny))
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64
    assert cost.parameters == 2 * 320 * 32 + 2 * (layer + 2 * 32) + 32
    assert cost.active_matrix_parameters == 320 * 32 + 2 * layer
    assert cost.flops_per_token(32) == 6 * cost.active_matrix_parameters + 12 * 2 * 32 * 32
    tied = model_cost(built(tiny, model__config__tie_word_embeddings=True))
    assert tied.active_matrix_parameters == cost.active_matrix_parameters
    assert tied.parameters == cost.parameters - 320 * 32


def test_model_cost_counts_active_experts_of_mixtral(tiny: dict[str, Any]) -> None:
    cost = model_cost(built(tiny, model__config=MIXTRAL))
    attention, router, experts = 32 * 32 * 2 + 2 * 32 * 16, 32 * 4, 3 * 32 * 48
    assert cost.active_matrix_parameters == 320 * 32 + 2 * (attention + router + 2 * experts)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("tied", [False, True])
def test_exported_model_has_equal_logits(tied: bool, tiny: dict[str, Any], tmp_path: Path) -> None:
    model = initialized_model(tiny, model__config__tie_word_embeddings=tied).eval()
    write_model(model, model.named_parameters(), tmp_path / "final", None)
    again = load_exported(tmp_path / "final")
    ids = torch.randint(0, 320, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert again.config.use_cache
    assert not list(tmp_path.glob(".final*"))


def test_infinite_number_in_model_description_is_read(tiny: dict[str, Any]) -> None:
    """Transformers writes it into JSON as an object."""
    model = built(tiny, model__config=inline(tiny_family("bamba")))
    description = json.loads(json.dumps(describe_model(model), allow_nan=False))
    assert (
        build_from_description(description).config.time_step_limit
        == model.config.time_step_limit
        == (0.0, float("inf"))
    )


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_language_model_of_multimodal_family_round_trips(model_type: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Its own configuration is not in the auto class's table; the family's, which is, contains it."""
    model = initialized_model(tiny, model__config=inline(tiny_family(model_type))).eval()
    write_model(model, model.named_parameters(), tmp_path / "final", None)
    again = load_exported(tmp_path / "final")
    ids = torch.randint(5, 256, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    rebuilt = build_from_description(describe_model(model))
    assert type(rebuilt) is type(model)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# --- pretrained ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def from_folder(tiny: dict[str, Any], folder: Path, **values: Any) -> Any:
    loaded = check_config(with_values(tiny, model={"path": str(folder), **values}), world_size=1, device="cpu")
    model = build_model(loaded)
    list(materialize(model, configured_weights(loaded)))
    return model


def test_pretrained_weights_are_loaded(tiny: dict[str, Any], folder: Path) -> None:
    model = from_folder(tiny, folder)
    expected = LlamaForCausalLM.from_pretrained(folder)
    for name, value in expected.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    assert model.dtype == torch.float32


def test_pretrained_folder_can_be_randomly_initialized(tiny: dict[str, Any], folder: Path) -> None:
    read, fresh = from_folder(tiny, folder), from_folder(tiny, folder, initialize="random")
    assert not torch.equal(read.lm_head.weight, fresh.lm_head.weight)


def test_code_in_model_folder_is_not_executed(tiny: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Evil: pass\n"
    (folder / "modeling_evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        "_attn_implementation_internal": "nobody/evil-kernel",
        "trust_remote_code": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = from_folder(tiny, folder)
    assert type(model) is LlamaForCausalLM
    assert model.config._attn_implementation == "sdpa"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("damage", "words"), [("shape", "mismatched|cannot be read"), ("missing", "missing"), ("cut", "cannot be read")]
)
def test_mismatched_weights_are_refused(damage: str, words: str, tiny: dict[str, Any], folder: Path) -> None:
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        if damage == "shape":
            state["model.norm.weight"] = torch.ones(7)
        else:
            del state["model.norm.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=words):
        from_folder(tiny, folder)


CUT = [
    Family("llama"),
    Family("gpt2"),
    Family("gpt_bigcode"),  # query heads cut, the one key and value head shared: two parameters of one weight
    Family("mixtral"),  # experts lie one by one in the files
    Family("qwen3_next"),
    Family("t5", "seq2seq_lm"),
]


@pytest.mark.fast
@pytest.mark.parametrize("family", CUT, ids=str)
def test_tensor_rank_reads_its_shard_only(family: Family, tmp_path: Path) -> None:
    whole = reference_model(family)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    expected = dict(whole.named_parameters())
    for rank in range(2):
        with torch.device("meta"):
            model = CLASSES[family.task].from_config(whole.config)
        mapper = TensorMapper(
            model, resolve_plan(model, {}, 2, rank), model_region(model, None, 2, rank), lambda count: None
        )
        for parameters in pretrained_weights(model, str(tmp_path)):
            mapper.shard_parameters(parameters)
        assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in whole.parameters())
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            assert torch.equal(parameter, shard.extract(expected[shard.name])), name
        for name, buffer in whole.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def peak_of_reading(folder: str) -> tuple[int, int, int]:
    """(peak anonymous memory above the start, bytes that the rank holds, bytes of the largest whole tensor)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    largest = max(p.numel() for p in model.parameters()) * 4
    mapper = TensorMapper(model, resolve_plan(model, {}, 4, 1), model_region(model, None, 4, 1), lambda count: None)
    start, peak, over = anonymous_bytes(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    for parameters in pretrained_weights(model, folder):
        mapper.shard_parameters(parameters)
    over.set()
    thread.join()
    return peak - start, sum(p.numel() for p in model.parameters()) * 4, largest


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_peak_memory_of_reading_is_shard_plus_largest_tensor(model_type: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 32000}
    config = AutoConfig.for_model(model_type, **sizes, num_attention_heads=8, num_key_value_heads=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    peak, part, largest = run_ranks(peak_of_reading, 1, str(tmp_path))[0]
    assert peak <= 1.1 * (part + largest)
