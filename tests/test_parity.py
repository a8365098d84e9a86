"""`python -m tools.parity`: agreement, differences that it must find and place, and mistakes of its user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.configs import with_values
from tests.harness import run_command
from tools.parity import comparison_jobs, matrix, page
from tools.parity.__main__ import main
from tools.parity.compared_config import prepare
from tools.parity.families import Family
from tools.parity.gradient_proof import Verdict
from tools.parity.layout import parse_layout
from tools.parity.results import Results, source_hash
from trainer.errors import ConfigError

layout = comparison_jobs.layout
"""The real one, where a test puts another in its place."""


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """Write the configuration of a tiny Llama with dropout and missing data."""
    path = tmp_path / "config.json"
    data = tiny["data"] | {"train": [{"path": "/no/such/corpus.jsonl"}], "validation": []}
    model = {"config": tiny["model"]["config"] | {"attention_dropout": 0.1}}
    path.write_text(json.dumps(tiny | {"data": data, "model": model}))
    return path


def test_pipeline_layouts_equal_reference(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["tensor=2", "tensor=2,sequence_parallel=true", "pipeline=2,accumulation=4,zero=1"]
    status = main(["--config", str(config), "--layouts", *layouts])
    said = capsys.readouterr().out
    assert status == 0, said
    rows = [line.split() for line in said.splitlines() if "..." not in line]
    assert [row[-1] for row in rows if row and row[0] in layouts] == ["equal"] * 3
    assert "dropout set to 0 (attention_dropout 0.1)" in said


SIDE_BY_SIDE = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4, "n_positions": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8},
}


@pytest.mark.parametrize("model_type", SIDE_BY_SIDE)
def test_parallel_branches_equal_reference_under_zero_3(model_type: str, config: Path) -> None:
    """ZeRO-3 gathers weights when the backward pass comes by: also by a branch that hands its sum to the other."""
    values = json.loads(config.read_text())
    values["model"] = {"config": {"model_type": model_type, "vocab_size": 259, **SIDE_BY_SIDE[model_type]}}
    config.write_text(json.dumps(values))
    assert main(["--config", str(config), "--layouts", "tensor=2,zero=3"]) == 0


def test_pretrained_weights_equal_reference_in_data_and_zero_layouts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(config.read_text())
    LlamaForCausalLM(LlamaConfig(**raw["model"]["config"])).save_pretrained(tmp_path / "model")
    config.write_text(json.dumps(raw | {"model": {"path": str(tmp_path / "model")}}))
    status = main(["--config", str(config), "--layouts", "tensor=2,data=2,zero=1"])
    assert status == 0, capsys.readouterr().out


def test_wrong_plan_is_located(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that passes the audit: GPT-2's fused q|k|v cut as if it were one matrix of heads."""
    raw = json.loads(config.read_text())
    model = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    plan = {"h.*.attn.c_attn": "colwise:head_dim"}
    config.write_text(json.dumps(with_values(raw, model={"config": model}, parallel={"tensor_plan": plan})))
    status = main(["--config", str(config), "--layouts", "tensor=2"])
    said = capsys.readouterr().out
    assert status == 1, said
    assert "first block that differs: transformer.h.0, by its output" in said
    assert "worst parameter: transformer." in said


def test_learning_rate_scales_are_compared(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(config.read_text())
    scales = {"model.embed_tokens.weight": 0.1, "model.layers.0.*": 0.5}
    config.write_text(json.dumps(with_values(raw, training__learning_rate_scales=scales)))
    status = main(["--config", str(config), "--layouts", "tensor=2"])
    assert status == 0, capsys.readouterr().out


def one_gradient_doubled(
    job: comparison_jobs.ComparisonJob, expected: comparison_jobs.Reference
) -> comparison_jobs.RankDifferences | comparison_jobs.Refusal:
    start = comparison_jobs.build_engine

    def started(*arguments: Any) -> Any:
        engine = start(*arguments)
        engine.models[0].get_submodule("model.layers.1.mlp.down_proj").weight.register_hook(
            lambda gradient: 2 * gradient
        )
        return engine

    comparison_jobs.build_engine = started  # type: ignore[assignment]
    return layout(job, expected)


def test_wrong_gradient_is_located(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the first step is exact, and so is every output."""
    monkeypatch.setattr(comparison_jobs, "layout", one_gradient_doubled)
    status = main(["--config", str(config), "--layouts", "tensor=2"])
    said = capsys.readouterr().out
    assert status == 1, said
    assert "worst parameter: model.layers.1.mlp.down_proj.weight, gradient off by 1 of" in said
    assert "(1 of 21 gradients differ)" in said
    assert "first block that differs: model.layers.1, by its gradients" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tensr=2"], "--layouts tensr=2: unknown key 'tensr'; did you mean 'tensor'?"),
        (["--layouts", "tensor=3"], "--layouts tensor=3: parallel.tensor: must divide the 4 attention heads"),
        (["--layouts", "tensor=2", "--set", "model.config.hiden_size=8"], "model.config.hiden_size: unknown key"),
    ],
)
def test_invalid_configuration_exits_with_2(config: Path, arguments: list[str], message: str) -> None:
    ended = run_command("tools/parity/__main__.py", "--config", str(config), *arguments)
    assert (ended.status, message in ended.err, "Traceback" in ended.err) == (2, True, False), ended.err


@pytest.mark.fast
@pytest.mark.parametrize(
    "text", ["tensor", "tensor=0", "tensor=two", "zero=4", "sequence_parallel=yes", "tensor=2,tensor=2", "pipeline=0"]
)
def test_invalid_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--layouts {text}"):
        parse_layout(text)


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config", "x.json"],
        ["--families", "llama", "--shrink"],
        ["--families", "llama", "--write"],
        ["--families", "llama", "lllama"],
        ["--config", "x.json", "--layouts", "tensor=2", "--tensor", "4"],
        ["--families", "llama", "--tensor", "1"],
        ["--families", "llama", "--pipeline", "2", "--sequence_parallel"],
        ["--families", "all", "--write", "--pipeline", "2"],
        ["--families", "llama", "--matrix", "--shapes"],
        ["--config", "x.json", "--layouts", "tensor=2", "--fresh"],
    ],
)
def test_invalid_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        main(arguments)


LLAMA = {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "attention_bias": True,
    "num_key_value_heads": 32,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
GEMMA = {"model_type": "gemma2", "final_logit_softcapping": None}
FALCON = {
    "model_type": "falcon",
    "new_decoder_architecture": True,
    "num_kv_heads": 8,
    "num_attention_heads": 128,
    "hidden_size": 8192,
}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model", "kept", "small"),
    [
        (
            LLAMA,
            {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA["rope_parameters"]},
            {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 4},
        ),
        (
            GEMMA,
            {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0},
            {"hidden_size": 64, "num_key_value_heads": 4},
        ),
        (FALCON, {"new_decoder_architecture": True}, {"num_kv_heads": 4, "num_attention_heads": 8}),
    ],
    ids=lambda value: value.get("model_type"),
)
def test_shrink_keeps_module_structure(
    config: Path, model: dict[str, Any], kept: dict[str, Any], small: dict[str, Any]
) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": {"config": model}}))
    subject = prepare(config, [], shrink=True)
    found = subject.raw["model"]["config"]
    assert {key: found[key] for key in kept | small} == kept | small
    assert subject.raw["data"]["sequence_length"] == 32


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Use an empty folder for cached verdicts."""
    monkeypatch.setattr(Results.__init__, "__defaults__", (tmp_path / "kept",))
    return tmp_path / "kept"


def crash(families: list[Family], column: matrix.Column) -> list[Verdict]:
    raise RuntimeError("the size of a tensor")


def test_rank_crash_becomes_verdict(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "_prove", crash)
    assert main(["--families", "llama"]) == 1
    assert "failed  llama: RuntimeError: the size of a tensor" in capsys.readouterr().out


def test_error_outside_ranks_becomes_verdict(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "prove_likeness", lambda family: {}["a family's own error"])
    assert main(["--families", "llama"]) == 1
    assert "tensor 2: 1 failed" in capsys.readouterr().out


def test_family_verdicts_are_counted_and_cached(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--families", "gpt_neox", "--tensor", "2"]) == 0
    assert "tensor 2: 2 right" in capsys.readouterr().out
    (file,) = results.iterdir()
    file.write_text(file.read_text() + '{"family": "killed while wri')
    monkeypatch.setattr(matrix, "_prove", crash)
    assert main(["--families", "gpt_neox", "--tensor", "2"]) == 0
    assert main(["--families", "gpt_neox", "--tensor", "2", "--fresh"]) == 1
    monkeypatch.setattr("tools.parity.results.source_hash", lambda: "another")
    assert main(["--families", "gpt_neox", "--tensor", "2"]) == 1


@pytest.mark.fast
def test_cache_key_covers_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("trainer/tensor_parallel", "tools/parity", "launch"):
        (tmp_path / folder).mkdir(parents=True)
    sources = (
        "trainer/tensor_parallel/region.py",
        "tools/parity/gradient_proof.py",
        "launch/train.py",
        "tools/ranks.py",
    )
    for source in sources:
        (tmp_path / source).write_text("a = 1\n")
    monkeypatch.chdir(tmp_path)
    hashes = {source_hash.__wrapped__()}
    for source in sources:
        (tmp_path / source).write_text("a = 2\n")
        hashes.add(source_hash.__wrapped__())
    assert len(hashes) == 1 + len(sources)


@pytest.mark.fast
def test_one_command_writes_page_and_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both totals come from the same rows, and a row that the command cannot train is not right."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nold totals\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "README", readme)
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs" / "page.md")
    rows = []
    for model_type, trained in (("llama", "right"), ("gemma4_text", "failed")):
        row = matrix.Row(Family(model_type), training=Verdict(model_type, 2, trained, "a reason"))
        row.generic = {column: Verdict(model_type, column.world, "right") for column in matrix.PAGES_COLUMNS}
        row.shapes = {("uneven", matrix.Column(2)): Verdict(model_type, 2, "refused", "122 columns")}
        rows.append(row)
    page.write(rows, seconds=90.0)
    said, totals = page.PAGE.read_text(), " ".join(readme.read_text().split())
    assert "| tensor 2: causal\\_lm | 2 | 1 right, 1 failed |" in said
    assert "| trained by launch/train.py | 2 | 1 right, 1 failed |" in said
    assert "| llama | uneven | tensor 2 | refused | 122 columns |" in said
    assert "1 pass under tensor 2, 1 with sequence parallelism" in totals
    assert "2 more proofs vary heads" in totals
    assert "2 refused" in totals
    assert totals.startswith("before")
    assert totals.endswith("after")
    assert "old totals" not in totals


@pytest.mark.fast
def test_layout_sets_its_values_and_keeps_the_others() -> None:
    layout = parse_layout("tensor=2,pipeline=2,data=3,zero=1,dualpipev=true")
    assert (layout.world_size, layout.data, str(layout)) == (12, 3, "tensor=2,pipeline=2,data=3,zero=1,dualpipev=true")
    config = {"parallel": {"tensor_plan": {}}, "deepspeed": {"zero_optimization": {"sub_group_size": 5}}}
    changed = layout.apply_to(config)
    assert changed["deepspeed"]["zero_optimization"] == {"sub_group_size": 5, "stage": 1}
    assert changed["parallel"] == {
        "tensor_plan": {},
        "tensor": 2,
        "pipeline": 2,
        "sequence_parallel": False,
        "pipeline_schedule": "dualpipev",
    }
    assert config["parallel"] == {"tensor_plan": {}}
