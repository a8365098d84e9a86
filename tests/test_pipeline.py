"""Pipeline stages: traced dataflow, assignment of layers, and every gradient of families in stages."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.configs import with_values
from tests.harness import run_command, run_ranks
from tests.meta_models import meta_model
from tests.test_families import REPRESENTATIVE, describe
from tools.parity import gradient_proof, stage_runner
from tools.parity.families import Family
from tools.parity.gradient_proof import Verdict, prove
from tools.parity.shrink import tiny as tiny_model
from trainer.config.load import check_config
from trainer.config.schema import ParallelSection
from trainer.errors import ConfigError, PlanError
from trainer.model import build_model, initialize_weights, read_weights
from trainer.model.weight_files import SafetensorsFiles
from trainer.pipeline import assign_stages, attention_to_recompute, balance, install_recomputation, trace_dataflow
from trainer.pipeline.balance import stage_bounds
from trainer.pipeline.dataflow import BATCH, LENGTH
from trainer.pipeline.stage import Stage, boundary_numel, parameter_stages
from trainer.tasks import example_ids

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


meta = functools.partial(meta_model, attention="eager")


# Following a model ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model_type", "fields", "crossing"),
    [
        ("llama", {}, ["model.layers.1"]),
        ("gpt2", {}, ["transformer.h.1"]),
        ("mixtral", {"output_router_logits": False}, ["model.layers.1"]),
        (
            "mixtral",
            {"output_router_logits": True},
            ["model.layers.0.mlp.gate", "model.layers.1", "model.layers.1.mlp.gate"],
        ),
        ("zamba2", {}, ["model.embed_tokens", "model.layers.2"]),
        ("gemma4_text", {}, ["model.embed_tokens_per_layer", "model.per_layer_projection_norm", "model.layers.1"]),
        ("roformer", {"is_decoder": True}, ["roformer.encoder.embed_positions", "roformer.encoder.layer.1"]),
        ("t5", {}, ["encoder.final_layer_norm", "decoder.block.0", "decoder.block.0", "decoder.block.0"]),
        ("bart", {}, ["model.encoder.layers.2"]),
    ],
)
def test_boundary_values_at_middle_layer(model_type: str, fields: dict[str, Any], crossing: list[str]) -> None:
    dataflow = trace_dataflow(meta(model_type, **fields))
    assert [value.module for value in dataflow.boundary_values(len(dataflow.units) // 2)] == crossing


@pytest.mark.fast
def test_parallel_module_lists_form_one_layer() -> None:
    dataflow = trace_dataflow(meta("xlm"))
    assert dataflow.units[0] == (
        "transformer.attentions.0",
        "transformer.layer_norm1.0",
        "transformer.ffns.0",
        "transformer.layer_norm2.0",
    )
    assert [value.module for value in dataflow.boundary_values(1)] == ["transformer.layer_norm2.0"]


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "bloom", "mamba2", "zamba2", "t5", "deepseek_v3"])
def test_stages_partition_layers_and_hold_every_weight(model_type: str) -> None:
    model = meta(model_type)
    dataflow = trace_dataflow(model)
    bounds = balance([1.0] * len(dataflow.units), 2)
    held = parameter_stages(model, dataflow, bounds)
    assert held.keys() == {name for name, _ in model.named_parameters()}
    for stage in range(2):
        own = dataflow.units[bounds[stage] : bounds[stage + 1]]
        assert own
        assert any(name.startswith(f"{unit[0]}.") for unit in own for name in held if stage in held[name])
    if model_type != "zamba2":  # whose layers share a transformer
        inside = [name for name in held if any(name.startswith(f"{m}.") for unit in dataflow.units for m in unit)]
        shared = {name for name in inside if len(held[name]) > 1}
        assert shared <= {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}
    if model.config.get_text_config(decoder=True).tie_word_embeddings:
        tied = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        assert held[tied] == (0, 1)


@pytest.mark.fast
def test_layer_costs_equal_flops() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    length = 2048
    costs = trace_dataflow(model).costs(length, trace_dataflow(model, example_ids(model, BATCH, 2 * LENGTH)))
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    plain = 2 * layer * length + 4 * length**2 * config.hidden_size
    head = 2 * config.hidden_size * config.vocab_size * length
    rotary = costs[0] - plain  # a product of positions and frequencies
    assert 0 <= rotary < 1e-4 * plain
    assert costs == pytest.approx([plain, plain, plain + head], rel=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["mamba2", "bamba", "qwen3_next", "falcon_h1"])
def test_layer_costs_of_chunked_kernels_are_positive(model_type: str) -> None:
    model = meta(model_type)
    assert min(trace_dataflow(model).costs(4096, trace_dataflow(model, example_ids(model, BATCH, 2 * LENGTH)))) > 0


@pytest.mark.fast
def test_boundary_numel_of_mixtral() -> None:
    dataflow = trace_dataflow(meta("mixtral", output_router_logits=True))
    experts = meta("mixtral").config.num_local_experts
    for ranks in (1, 2):
        assert boundary_numel(dataflow, 2, batch=5, length=32, sequence_ranks=ranks) == {
            "model.layers.*": 5 * 32 * 64 // ranks,
            "model.layers.*.mlp.gate": 2 * 5 * 32 * experts,
        }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gemma3n_text", {}, "a value computed inside model.layers.0 is read after layer 2"),
        ("hrm_text", {}, "hrm_text has no list of layers that run in a row"),
        ("xlnet", {}, "xlnet cannot be traced on the meta device"),
    ],
)
def test_unsplittable_model_is_refused(model_type: str, fields: dict[str, Any], reason: str) -> None:
    model = meta(model_type, **fields)
    with pytest.raises(PlanError, match=reason):
        Stage(model, trace_dataflow(model), [0, 2, 4], 1)


# Dividing layers ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_balance_minimizes_slowest_stage() -> None:
    draw = random.Random(5)
    for _ in range(60):
        costs = [draw.choice([0.0, 1.0, 2.0, 7.5]) + draw.random() for _ in range(draw.randint(2, 9))]
        stages = draw.randint(1, len(costs))
        speeds = [draw.choice([0.5, 1.0, 2.0]) for _ in range(stages)]

        def slowest(bounds: Any, costs: list[float] = costs, speeds: list[float] = speeds) -> float:
            return max(sum(costs[a:b]) / speed for a, b, speed in zip(bounds, bounds[1:], speeds, strict=False))

        inner = itertools.combinations(range(1, len(costs)), stages - 1)
        best = min(slowest((0, *cuts, len(costs))) for cuts in inner)
        found = balance(costs, stages, speeds)
        assert (found[0], found[-1], len(found)) == (0, len(costs), stages + 1)
        assert all(a < b for a, b in itertools.pairwise(found))
        assert slowest(found) == pytest.approx(best)


@pytest.mark.fast
def test_stage_bounds() -> None:
    assert stage_bounds([1.0] * 8, 4) == [0, 2, 4, 6, 8]
    assert stage_bounds([1.0] * 7 + [2.0], 4) == [0, 2, 4, 6, 8]  # a head as heavy as a layer
    assert stage_bounds([1.0] * 6, 2, speeds=[2.0, 1.0]) == [0, 4, 6]
    assert stage_bounds([1.0] * 6, 2, layers=[1, 5]) == [0, 1, 6]
    with pytest.raises(
        ConfigError, match=r"parallel.pipeline: must be at most the 6 layers of the model \(got 7\). Lower it"
    ):
        stage_bounds([1.0] * 6, 7)
    with pytest.raises(
        ConfigError,
        match=r"parallel.pipeline_layers: must add up to the 6 layers of the model \(got \[2, 3\], 5 layers\)",
    ):
        stage_bounds([1.0] * 6, 2, layers=[2, 3])


@pytest.mark.fast
def test_bubble_of_schedules() -> None:
    assert ParallelSection().bubble(8) == 0
    assert ParallelSection(pipeline=4).bubble(12) == pytest.approx(3 / 15)
    assert ParallelSection(pipeline=4, pipeline_schedule="dualpipev").bubble(12) == pytest.approx(15 / (72 + 15))


def dry_run(config: dict[str, Any], folder: Path, *arguments: str) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return run_command(TRAIN, "--config", str(folder / "config.json"), "--dry_run", *arguments)


def test_dry_run_shows_the_stages(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(tiny, parallel__pipeline=2, parallel__tensor=2)
    ended = dry_run(config, tmp_path, "--world", "8")
    assert ended.status == 0, ended.err
    assert "processes    8 = pipeline 2 x data 2 x tensor 2" in ended.out
    assert "pipeline     2 stages on 2 ranks (1f1b), 2 micro-batches: a bubble of 33.3%" in ended.out
    rows = [line.split() for line in ended.out.splitlines() if line.split()[2:3] in (["0-0"], ["1-1"])]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "1"]]
    assert "0.01 MB (model.layers.*)" in ended.out
    assert "warning" not in ended.out


def test_dry_run_shows_two_stages_per_rank(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(
        tiny,
        parallel__pipeline=2,
        parallel__pipeline_schedule="dualpipev",
        model__config__num_hidden_layers=5,
        parallel__pipeline_layers=[1, 1, 2, 1],
    )
    said = dry_run(config, tmp_path).out
    assert "pipeline     4 stages on 2 ranks (dualpipev), 4 micro-batches: a bubble of 17.2%" in said
    rows = [line.split() for line in said.splitlines() if line.split()[2:3] in (["0-0"], ["1-1"], ["2-3"], ["4-4"])]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "1"], ["2", "1"], ["3", "0"]]
    assert rows[0][4] == rows[3][4]


def test_large_pipeline_bubble_is_warned_about(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(tiny, parallel__pipeline=2, deepspeed__train_micro_batch_size_per_gpu=8)
    said = dry_run(config, tmp_path).out
    assert "1 micro-batches on 2 pipeline ranks: a bubble of 50%" in said


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"parallel__pipeline": 3}, "parallel.pipeline: must be at most the 2 layers of the model (got 3)"),
        (
            {"parallel__pipeline": 2, "parallel__pipeline_layers": [2, 1]},
            "must add up to the 2 layers of the model (got [2, 1], 3 layers)",
        ),
        (
            {"parallel__pipeline": 2, "model__config": {"model_type": "opt", "layerdrop": 0.1, "vocab_size": 320}},
            "opt skips layers at random (layerdrop 0.1)",
        ),
        (
            {"parallel__pipeline": 2, "model__config": {"model_type": "hrm_text", "vocab_size": 320}},
            "hrm_text has no list of layers",
        ),
        (
            {"parallel__pipeline": 2, "model__config": {"model_type": "rwkv", "vocab_size": 320}},
            "rwkv uses rwkv.blocks.1.attention.output.weight in different layers in evaluation",
        ),
    ],
)
def test_invalid_stage_assignment_is_refused(
    values: dict[str, Any], reason: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    ended = dry_run(
        with_values(tiny, deepspeed__train_batch_size=None, deepspeed__gradient_accumulation_steps=4, **values),
        tmp_path,
    )
    assert ended.status == 2, ended.out
    assert reason in ended.err
    assert "Traceback" not in ended.err


def test_selective_recomputation_reruns_attention_only(tiny: dict[str, Any]) -> None:
    """Attention runs again in the backward pass, up to the last input that is needed; nothing else does."""
    config = check_config(with_values(tiny, model__activation_checkpointing="selective"), world_size=1, device="cpu")
    gradients = []
    for again in (False, True):
        model = build_model(config)
        names = attention_to_recompute(model, config)
        assert names == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        initialize_weights(model, seed=1)
        install_recomputation(model, config, names if again else ())
        calls: Counter[str] = Counter()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))  # type: ignore[misc]
        model.train()(input_ids=torch.arange(20)[None]).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        twice = {name for name, count in calls.items() if count > 1}
        assert twice == ({f"{name}.{p}_proj" for name in names for p in "qkv"} if again else set())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_selective_recomputation_without_attention_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "model__activation_checkpointing": "selective",
        "model__config": {"model_type": "mamba", "vocab_size": 320},
    }
    ended = dry_run(with_values(tiny, **values), tmp_path)
    assert ended.status == 2, ended.out
    assert (
        "model.activation_checkpointing: 'selective' recomputes attention, and mamba has no attention modules"
        in ended.err
    )


# Every gradient -------------------------------------------------------------------------------------------------------


def in_stages(families: list[Family], stages: int, sequence_parallel: bool = False) -> list[Verdict]:
    return prove(families, pipeline=stages, sequence_parallel=sequence_parallel)


def test_gradients_equal_in_two_stages() -> None:
    more = [Family("inkling2_text"), Family("hy_v4")]  # hidden state that is not contiguous; whole numbers that travel
    found = run_ranks(in_stages, 2, [*REPRESENTATIVE, *more], 2)[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


@pytest.mark.parametrize(("tensor", "pipeline", "sequence_parallel"), [(1, 4, False), (2, 2, False), (2, 2, True)])
def test_gradients_equal_in_hybrid_layouts(tensor: int, pipeline: int, sequence_parallel: bool) -> None:
    kinds = ("llama", "gpt2", "mixtral", "bloom", "gpt_neox", "falcon", "t5" if pipeline == 4 else "bart")
    families = [family for family in REPRESENTATIVE if family.model_type in kinds]
    found = run_ranks(in_stages, tensor * pipeline, families, pipeline, sequence_parallel)[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def packed(families: list[Family]) -> list[Verdict]:
    """Documents side by side in one sequence, told apart by their positions."""
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    return prove(families, pipeline=2, more={"position_ids": positions})


def test_gradients_equal_for_packed_documents() -> None:
    found = run_ranks(packed, 2, [Family("llama"), Family("qwen3"), Family("mixtral"), Family("gpt_neox")])[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def no_sum_of_shared_gradients(families: list[Family]) -> list[Verdict]:
    stage_runner.shared_parameters = lambda models, parameter_ranks, world: iter(())
    return prove(families, pipeline=2)


def no_auxiliary_loss_of_the_first_stage(families: list[Family]) -> list[Verdict]:
    from trainer.pipeline import stage

    unpack = stage._unpack

    def forgetting(values: Any, record: Any) -> Any:
        for value, tensor in unpack(values, record):
            yield value, torch.zeros_like(tensor) if value.module.endswith("gate") else tensor

    stage._unpack = forgetting
    return prove(families, pipeline=2)


def stages_swapped(families: list[Family]) -> list[Verdict]:
    """The first stage computes with the last one's layers."""
    staged = gradient_proof._staged

    def swapped(family: Family, cut: PreTrainedModel, world: Any) -> Any:
        layers = cut.get_submodule("model.layers")
        first, last = layers[0].state_dict(), layers[-1].state_dict()
        layers[0].load_state_dict({name: tensor.clone() for name, tensor in last.items()})
        layers[-1].load_state_dict({name: tensor.clone() for name, tensor in first.items()})
        return staged(family, cut, world)

    gradient_proof._staged = swapped  # type: ignore[assignment]
    return prove(families, pipeline=2)


@pytest.mark.parametrize(
    ("sabotage", "model_type"),
    [
        (no_sum_of_shared_gradients, "gpt2"),
        (no_auxiliary_loss_of_the_first_stage, "mixtral"),
        (stages_swapped, "llama"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_layout_comparison_detects_sabotage(sabotage: Any, model_type: str) -> None:
    (verdict,) = run_ranks(sabotage, 2, [Family(model_type)])[0]
    assert verdict.outcome == "wrong"


def test_gpu_attention_kernels_are_traced_on_cpu(tiny: dict[str, Any]) -> None:
    """FlexAttention cannot be traced on the meta device; eager attention, which computes the same, can."""
    tiny = with_values(tiny, parallel__pipeline=2, model__activation_checkpointing="selective")
    assignments = []
    for attention in ("sdpa", "flex_attention"):
        config = check_config(with_values(tiny, model__attention=attention), world_size=2, device="cpu")
        model = build_model(config)
        assignments.append((assign_stages(model, config), attention_to_recompute(model, config)))
        assert model.config._attn_implementation == attention
    (plain, plain_attention), (flex, flex_attention) = assignments
    assert plain is not None
    assert flex is not None
    assert (flex.bounds, flex.costs, flex_attention) == (plain.bounds, plain.costs, plain_attention)


# Reading and writing --------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_stage_reads_its_weights_only(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_model(model_type))
    whole.save_pretrained(tmp_path)
    asked: list[str] = []
    for name in ("read", "view"):
        plain = getattr(SafetensorsFiles, name)

        def noting(self: Any, key: str, plain: Any = plain) -> Any:
            asked.append(key)
            return plain(self, key)

        monkeypatch.setattr(SafetensorsFiles, name, noting)
    dataflow = trace_dataflow(meta(model_type))
    bounds = [0, 2, len(dataflow.units)]
    for number in range(2):
        asked.clear()
        model = meta(model_type)
        stage = Stage(model, dataflow, bounds, number)
        parameter_ranks = stage.drop_remote_parameters()
        read_weights(model, str(tmp_path))
        assert {name for name, _ in model.named_parameters()} == {n for n, s in parameter_ranks.items() if number in s}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name))
        other = dataflow.units[bounds[1 - number]][0]
        assert not [key for key in asked if key.startswith(f"{other}.")]
