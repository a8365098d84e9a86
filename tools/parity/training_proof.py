"""Trains a model with `launch/train.py` in several layouts, and compares the export with the reference.

One step in each of some layouts, each after it has loaded the checkpoint of the layout before; the export, read by
`from_pretrained`. Its weights and its held-out loss are compared with those of a plain Hugging Face model that a bare
torch loop has trained on the same samples from the same weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tools.parity.compared_config import RawConfig
from tools.parity.dropout import without_dropout
from tools.parity.families import Family
from tools.parity.gradient_proof import TOLERANCE, Verdict, tiny_config
from tools.parity.layout import Layout
from tools.parity.reference import held_out_loss, load_reference_model, scaled_sgd, train_reference
from tools.parity.text import last_line
from tools.ranks import run_command, run_ranks
from trainer.config.load import load_config
from trainer.config.model_config import model_config, scrub
from trainer.config.model_facts import model_facts
from trainer.config.schema import ModelSection
from trainer.data import open_batches, prepare_data
from trainer.data.indexed import IndexedWriter, id_type
from trainer.errors import ConfigError
from trainer.tensor_parallel import has_active_dropout
from trainer.topology import Topology

LENGTH = 24
RATE = 0.1
_MICRO = 2
_SAMPLES = 12
"""Minimum number of full samples of each split."""

_FIRST_ID = 5
"""First random id: lower ids are special tokens in most vocabularies."""

_DRIFT = 2e-3
"""Largest difference of a weight after the steps, as a share of the tensor's change."""

_FLOOR = 1e-2
"""Minimum change that a difference is relative to, as a share of the largest change of all tensors."""

_RESOLUTION = 1e-3
"""A change counts as at least this share of the tensor's largest element: fp32 has 24 bits."""


def tiny_model(family: Family) -> RawConfig:
    """Return the sections of a configuration that describe a family's tiny model.

    Infinities, which JSON cannot express, are left to the family's default.

    Raises: Exception: any type of the family's constructor, if the family cannot be made tiny.
    """
    whole = json.loads(tiny_config(family).to_json_string(use_diff=False))
    config = scrub({key: value for key, value in whole.items() if "__float__" not in json.dumps(value)})
    return {"model": {"config": config, "initialize": "random"}}


def prove_training(name: str, sections: RawConfig, layouts: Sequence[Layout], *, length: int = LENGTH) -> Verdict:
    """Train a model with the command, one step in each of `layouts`.

    Dropout is set to 0 in an inline configuration; the weights of a folder's model that has dropout are not compared,
    which is the reason of the verdict.

    Args:
        name: Name in the verdict.
        layouts: Layout of each step.
        sections: `model`, and where they are given `parallel.tensor_plan`, `training` and
            `deepspeed.zero_optimization`, whose stage applies to layouts without one.
        length: `data.sequence_length`.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-training-") as folder:
        try:
            config = _write_config(Path(folder), sections, layouts, length)
        except ConfigError as error:
            return Verdict(name, layouts[0].world_size, "refused", str(error.problems[0]))
        for step, layout in enumerate(layouts, start=1):
            try:
                result = run_command(
                    "launch/train.py",
                    "--config",
                    str(config),
                    f"--set=training.max_steps={step}",
                    *(f"--set={override}" for override in _overrides(layout)),
                    world=layout.world_size,
                )
            except AssertionError as error:  # a hang
                return Verdict(name, layout.world_size, "failed", f"{layout}: {last_line(str(error))}")
            if result.status:
                outcome = "refused" if result.status == 2 else "failed"
                return Verdict(name, layout.world_size, outcome, f"{layout}: {_cause(result.err)}")
        try:
            verdict: Verdict = run_ranks(compare, 1, name, str(config))[0]
        except AssertionError as error:
            return Verdict(name, 1, "failed", f"the export: {last_line(str(error))}")
        return verdict


def _overrides(layout: Layout) -> list[str]:
    return [f"{path}={json.dumps(value)}" for path, value in layout.values.items()]


def _cause(err: str) -> str:
    """Return the error in a command's output."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1].removeprefix("[tessera] ").removeprefix("error: ")


def _write_config(folder: Path, sections: RawConfig, layouts: Sequence[Layout], length: int) -> Path:
    """Write the configuration, and random ids as token files."""
    micro_batches = math.lcm(*(layout.data for layout in layouts)) * max(
        4, *(2 * layout.pipeline for layout in layouts)
    )
    model = sections["model"]
    raw = {
        **sections,
        "model": model | {"config": without_dropout(model["config"])} if model.get("config") else model,
        "run": {**sections.get("run", {}), "output_dir": str(folder / "run"), "seed": 5},
        "data": {
            "train": [{"path": str(folder / "train.bin")}],
            "validation": [{"path": str(folder / "validation.bin")}],
            "sequence_length": length,
            "cache_dir": str(folder / "cache"),
        },
        "training": {**sections.get("training", {}), "epochs": None, "max_steps": len(layouts), "log_every_steps": 1},
        "evaluation": {"max_batches": 1},
        "deepspeed": {
            "train_batch_size": _MICRO * micro_batches,
            "train_micro_batch_size_per_gpu": _MICRO,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "gradient_clipping": 1.0,
            **sections.get("deepspeed", {"zero_optimization": {"stage": 1}}),
        },
    }
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    vocabulary = model_facts(model_config(ModelSection(**sections["model"]))).vocabulary_size
    draw = np.random.default_rng(1)
    for split in ("train", "validation"):
        with IndexedWriter(folder / split, id_type(vocabulary)) as writer:
            for _ in range(2 * _SAMPLES):
                ids = draw.integers(min(_FIRST_ID, vocabulary - 1), vocabulary, int(draw.integers(3, 2 * length)))
                writer.add(ids.tolist())
    return path


def compare(name: str, path: str) -> Verdict:
    """Compare the command's export with the reference."""
    loaded = load_config(path, world_size=1, device="cpu")
    batches = open_batches(loaded, prepare_data(loaded), Topology.of(1, 0))
    model, run = load_reference_model(loaded).train(), Path(loaded.config.run.output_dir)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_reference(
        model,
        scaled_sgd(model, RATE, loaded.config.training),
        (batches.train.batch_at(step).micro_batches for step in range(1, loaded.steps + 1)),
        loaded.config.training,
        before_update=lambda step: 1.0,
    )
    transformers_logging.disable_progress_bar()
    exported: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(run / "final"), attn_implementation=loaded.attention, dtype=torch.float32, trust_remote_code=False
    )
    verdict = Verdict(name, 1, "right")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reported = [row["loss"] for row in rows if row["split"] == "validation"][-1]
    verdict.loss = held_out_loss(exported.eval(), batches.validation, loaded.config.training), reported
    if not abs(verdict.loss[0] - verdict.loss[1]) <= TOLERANCE * abs(verdict.loss[0]):
        verdict.outcome, verdict.reason = "wrong", "the export's held-out loss differs from the run's"
    elif has_active_dropout(model):  # both draw different random numbers
        verdict.reason = "weights not compared, because dropout is active"
    else:
        _compare_weights(verdict, dict(exported.named_parameters()), dict(model.named_parameters()), before)
    return verdict


def _compare_weights(
    verdict: Verdict, exported: dict[str, nn.Parameter], trained: dict[str, nn.Parameter], before: dict[str, Tensor]
) -> None:
    changed = {name: float((p.detach() - before[name]).abs().max()) for name, p in trained.items()}
    floor = _FLOOR * max(changed.values())
    for name, parameter in trained.items():
        weight = exported.get(name)
        error = math.inf
        if weight is not None and weight.shape == parameter.shape:
            scale = max(changed[name], floor, _RESOLUTION * float(parameter.detach().abs().max()))
            error = float((weight.detach() - parameter.detach()).abs().max()) / scale
        error = error if math.isfinite(error) else math.inf  # NaN compares as false
        if error > verdict.worst:
            verdict.worst, verdict.worst_name = error, name
    if not verdict.worst <= _DRIFT:
        verdict.outcome, verdict.reason = "wrong", f"{verdict.worst_name} differs from the reference"
