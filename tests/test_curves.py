"""The command: a family that is sharded over ranks has the loss curve and the final model of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness import run_command
from tools.parity.shrink import tiny as tiny_model

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")
STEPS = 20
VOCABULARY = 323
"""Divisible by no number of ranks."""

IGNORED_FIELDS = ("_name_or_path", "transformers_version", "architectures", "dtype", "time_step_limit")

FEW_FAMILIES = [
    ("llama", {"tensor": 2}),
    pytest.param("mixtral", {"tensor": 2, "sequence_parallel": True}, marks=pytest.mark.matrix),
    ("gpt2", {"pipeline": 2}),
    pytest.param("gpt2", {"pipeline": 2, "pipeline_schedule": "dualpipev"}, marks=pytest.mark.matrix),
]
TENSOR_FAMILIES = [
    "gpt2",
    "bloom",
    "opt",
    "gpt_neox",
    "gptj",
    "falcon",
    "phi",
    "phi3",
    "cohere",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "olmoe",
    "mistral",
    "starcoder2",
    "stablelm",
    "mpt",
    "gpt_bigcode",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "granite",
]
PIPELINE_FAMILIES = ["llama", "bloom", "gemma2", "mixtral", "deepseek_v3", "mamba2", "falcon", "qwen3_next"]


def run(model_type: str, world: int, parallel: dict[str, Any], base: dict[str, Any], folder: Path) -> list[float]:
    """Return the losses that `launch/train.py` logs, those of evaluation included."""
    tiny_config_of_family = tiny_model(model_type, vocab_size=VOCABULARY)
    model = tiny_config_of_family.to_diff_dict() | {
        key: 0.0 for key, v in vars(tiny_config_of_family).items() if "drop" in key and v and v is not True
    }
    model = {key: value for key, value in model.items() if value is not None and key not in IGNORED_FIELDS}
    config = json.loads(json.dumps(base))
    config["model"] = {"config": model | {"model_type": model_type}}
    config["run"]["output_dir"] = str(folder)
    config["training"] = {"max_steps": STEPS, "log_every_steps": 1}
    config["parallel"] = parallel
    config["deepspeed"]["zero_optimization"] = {"stage": 1}
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(config))
    ended = run_command(TRAIN, "--config", str(path), world=world)
    assert ended.status == 0, ended.err + ended.out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def compare(model_type: str, parallel: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    reference_losses = run(model_type, 1, {}, base, folder / "one")
    ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    parallel_losses = run(model_type, ranks, parallel, base, folder / "two")
    assert len(reference_losses) == len(parallel_losses) == STEPS + 2
    assert parallel_losses == pytest.approx(reference_losses, rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(folder / name / "final").eval() for name in ("one", "two")]
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits for model in models)
    assert one.shape[-1] == VOCABULARY
    torch.testing.assert_close(two, one, rtol=0, atol=2e-3 * float(one.abs().max()))


@pytest.mark.parametrize(("model_type", "parallel"), FEW_FAMILIES, ids=str)
def test_curve_of_few_families_equals_one_process(
    model_type: str, parallel: dict[str, Any], base: dict[str, Any], tmp_path: Path
) -> None:
    compare(model_type, parallel, base, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", TENSOR_FAMILIES)
def test_tensor_parallel_curve_equals_one_process(model_type: str, base: dict[str, Any], tmp_path: Path) -> None:
    compare(model_type, {"tensor": 2}, base, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
@pytest.mark.parametrize("model_type", PIPELINE_FAMILIES)
def test_pipeline_curve_equals_one_process(
    model_type: str, parallel: dict[str, Any], base: dict[str, Any], tmp_path: Path
) -> None:
    compare(model_type, parallel, base, tmp_path)
