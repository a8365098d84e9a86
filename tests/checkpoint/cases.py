"""Models, layouts, manifests and commands of the checkpoint tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.checkpoint_jobs import run_jobs
from tests.commands import ROOT, TRAIN
from tests.configs import with_values
from tests.harness import CommandResult, run_command, run_ranks
from tests.test_model import GPT2, MIXTRAL
from tools.parity.layout import Changes, Layout
from trainer.checkpoint_format import Manifest

BF16: Changes = (("deepspeed.bf16", {"enabled": True}),)
BF16_FP32: Changes = (*BF16, ("deepspeed.data_types", {"grad_accum_dtype": "fp32"}))
OFFLOAD: Changes = (("deepspeed.zero_optimization.offload_optimizer", {"device": "cpu"}),)
SMALL_GROUPS: Changes = (
    ("deepspeed.zero_optimization.sub_group_size", 5000),
    ("deepspeed.zero_optimization.stage3_param_persistence_threshold", 100),
)

DROPOUT = {"model__config__attention_dropout": 0.2}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
"""Its router has a persistent buffer."""

MODELS: dict[str, dict[str, Any]] = {
    # 323 is not divisible by 2 or 4, so the vocabulary is padded.
    "llama": {"model__config__num_hidden_layers": 4, "model__config__vocab_size": 323},
    "tied": {"model__config__num_hidden_layers": 4, "model__config__tie_word_embeddings": True},
    "gpt2": {"model__config": GPT2 | NO_DROPOUT | {"n_layer": 4, "vocab_size": 323}},
    "mixtral": {"model__config": MIXTRAL | {"num_hidden_layers": 4}},
    "deepseek_v3": {"model__config": DEEPSEEK},
    "large": {"model__config__vocab_size": 20_000},
}


class UnbrokenRun(NamedTuple):
    """A run of six steps that saved after the third and the sixth."""

    folder: Path
    losses: dict[int, float]
    """By step."""

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08}"


RunUnbroken = Callable[..., UnbrokenRun]
"""Runs a model in a layout without interruption; see the fixture `unbroken_run`."""


def run_config(base: dict[str, Any], model: str, layout: Layout, run: Path, **values: Any) -> dict[str, Any]:
    """Return the configuration of one of `MODELS` in a layout."""
    return layout.apply_to(with_values(base, run__output_dir=str(run), **MODELS[model], **values))


def with_resume(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    return with_values(config, checkpoint__resume=str(folder))


def run_in_one_world(jobs: list[tuple[Any, ...]], world: int = 1) -> list[Any]:
    """Return rank 0's outcome of each job; see `run_jobs`."""
    return list(run_ranks(run_jobs, world, jobs)[0])


def run_cli(config: dict[str, Any], folder: Path, *arguments: str, world: int = 1) -> CommandResult:
    """Run the training command with a configuration file in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return run_command(TRAIN, "--config", str(folder / "config.json"), *arguments, world=world)


def run_tool(*arguments: object) -> CommandResult:
    """Run `tools/checkpoint.py`."""
    return run_command(str(ROOT / "tools" / "checkpoint.py"), *map(str, arguments))


def validation_sources(base: dict[str, Any]) -> list[dict[str, str]]:
    return [{"path": str(Path(base["data"]["train"][0]["path"]).with_name("validation.jsonl"))}]


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def make_manifest(**fields: Any) -> Manifest:
    """Return a manifest without tensors; `fields` replace the defaults."""
    defaults: dict[str, Any] = {
        "step": 1,
        "attempt": 1,
        "created": "",
        "tokens": 0,
        "samples": 0,
        "losses": {},
        "config": {},
        "about": {"world": {"pipeline": 1, "data": 1, "tensor": 1}},
        "model": {},
        "data": {},
        "trackers": {},
        "scalar_state": {},
        "files": (),
        "tensors": {},
    }
    return Manifest(**{**defaults, **fields})
