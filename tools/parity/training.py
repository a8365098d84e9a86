"""A family's whole way through `launch/train.py`: what a proof of gradients does not pass through.

One step in one layout, with its checkpoint; the second step after it was loaded in another layout; the export, read by
`from_pretrained`. Its weights and its held-out loss are compared with those of a plain Hugging Face model that a bare
torch loop has trained on the same samples from the same random weights.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.parity.families import Family
from tools.parity.proof import TOLERANCE, Verdict, tiny_config
from tools.ranks import run_command, run_ranks
from trainer.config.load import load_config
from trainer.config.model_facts import scrub
from trainer.data import open_batches, prepare_data
from trainer.data.batches import IGNORED, MicroBatch
from trainer.data.indexed import IndexedWriter, id_type
from trainer.model import build_model, initialize_weights
from trainer.model.tasks import AUXILIARY_COEFFICIENTS
from trainer.topology import Topology

LENGTH = 16
STEPS = 2
RATE = 0.1
_DOCUMENTS = 24
_FIRST_ID = 5
"""Random ids begin here: those below are special ones in most vocabularies."""

_DRIFT = 2e-3
"""Largest difference of a weight after the steps, as a share of what the tensor changed by."""

_FLOOR = 1e-2
"""A tensor that changed by less than this share of the largest change is held against that."""


@dataclass(frozen=True)
class Layout:
    """How a model is divided."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        axes = (("tensor", self.tensor), ("pipeline", self.pipeline), ("data", self.data))
        return " x ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "one process"


def prove_training(family: Family, first: Layout, second: Layout) -> Verdict:
    """Trains the family's tiny model by the command: a step in the `first` layout, and one in the `second`."""
    try:
        model = inline(family)
    except Exception as error:  # the families' constructors raise what they like
        return Verdict(str(family), first.world, "not built", f"{type(error).__name__}: {error}".splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="tessera-training-") as name:
        folder = Path(name)
        config = _write(folder, model)
        for step, layout in enumerate((first, second), start=1):
            ended = run_command(
                "launch/train.py", "--config", str(config),
                *(f"--set={key}={value}" for key, value in (
                    ("training.max_steps", step), ("parallel.tensor", layout.tensor),
                    ("parallel.pipeline", layout.pipeline))),
                world=layout.world,
            )  # fmt: skip
            if ended.status:
                outcome = "refused" if ended.status == 2 else "failed"
                return Verdict(str(family), layout.world, outcome, f"{layout}: {_error(ended.err)}")
        try:
            verdict: Verdict = run_ranks(_compare, 1, str(family), str(config))[0]
        except AssertionError as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(" ")]
            return Verdict(str(family), first.world, "failed", f"the export: {lines[-1] if lines else 'no message'}")
        return verdict


def inline(family: Family) -> dict[str, Any]:
    """The tiny model's configuration as it stands in a file; infinities, which are none of JSON's numbers, left out."""
    whole = json.loads(tiny_config(family).to_json_string(use_diff=False))
    return scrub({key: value for key, value in whole.items() if "__float__" not in json.dumps(value)})


def _error(err: str) -> str:
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()]
    return (told or lines or ["no message"])[-1].removeprefix("[tessera] ").removeprefix("error: ")


def _write(folder: Path, model: dict[str, Any]) -> Path:
    """The configuration, and random ids as token files."""
    vocabulary = int(model["vocab_size"] if "vocab_size" in model else model["text_config"]["vocab_size"])
    draw = np.random.default_rng(1)
    for split in ("train", "validation"):
        with IndexedWriter(folder / split, id_type(vocabulary)) as writer:
            for _ in range(_DOCUMENTS):
                low = min(_FIRST_ID, vocabulary - 1)
                writer.add(draw.integers(low, vocabulary, int(draw.integers(3, 2 * LENGTH))).tolist())
    raw = {
        "run": {"output_dir": str(folder / "run"), "seed": 5},
        "model": {"config": model, "initialize": "random"},
        "data": {
            "train": [{"path": str(folder / "train.bin")}], "validation": [{"path": str(folder / "validation.bin")}],
            "sequence_length": LENGTH, "cache_dir": str(folder / "cache"),
        },
        "training": {"max_steps": STEPS, "log_every_steps": 1},
        "evaluation": {"max_batches": 2},
        "deepspeed": {
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}}, "zero_optimization": {"stage": 1},
        },
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return path


def _compare(family: str, path: str) -> Verdict:
    """The command's export against a bare loop."""
    loaded = load_config(path, world=1, device="cpu")
    prepared = prepare_data(loaded, builder=True)
    batches = open_batches(loaded, prepared, Topology.of(1, 0))
    model = build_model(loaded, prepared.tokenizer)
    initialize_weights(model, loaded.config.run.seed)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, STEPS + 1):
        _step(model, list(batches.train.at(step).micro_batches))
    run = Path(loaded.config.run.output_dir)
    exported: Any = AutoModelForCausalLM.from_pretrained(str(run / "final"), attn_implementation=loaded.attention)
    verdict = Verdict(family, 1, "right")
    held_out = _held_out(exported.eval(), batches.validation)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    verdict.loss = held_out, [row["loss"] for row in rows if row["split"] == "validation"][-1]
    found = dict(exported.named_parameters())
    changed = {name: float((p - before[name]).abs().max()) for name, p in model.named_parameters()}
    floor = _FLOOR * max(changed.values())
    for name, parameter in model.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            return Verdict(family, 1, "wrong", f"the export lacks {name}")
        error = float((found[name] - parameter).abs().max()) / max(changed[name], floor)
        if not error <= verdict.worst:
            verdict.worst, verdict.worst_name = error, name
    if not verdict.worst <= _DRIFT:
        verdict.outcome, verdict.reason = "wrong", f"{verdict.worst_name} is not what a bare loop trains"
    elif not abs(verdict.loss[0] - verdict.loss[1]) <= TOLERANCE * abs(verdict.loss[0]):
        verdict.outcome, verdict.reason = "wrong", "the export's held-out loss is not the run's"
    return verdict


def _losses(model: PreTrainedModel, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """(summed cross entropy, weighted auxiliary loss)."""
    output = model(input_ids=micro.input_ids_BT, attention_mask=micro.attention_mask_BT, use_cache=False)
    logits, labels = output.logits.float().flatten(0, 1), micro.labels_BT.flatten()
    auxiliary = getattr(output, "aux_loss", None)
    weighted = torch.zeros(())
    if isinstance(auxiliary, Tensor):
        config = model.config.get_text_config(decoder=True)
        weighted = auxiliary * next(getattr(config, name) for name in AUXILIARY_COEFFICIENTS if hasattr(config, name))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), weighted


def _tokens(micro_batches: list[MicroBatch]) -> int:
    return sum(int((micro.labels_BT != IGNORED).sum()) for micro in micro_batches)


def _step(model: PreTrainedModel, micro_batches: list[MicroBatch]) -> None:
    tokens = _tokens(micro_batches)
    for micro in micro_batches:
        cross_entropy, auxiliary = _losses(model, micro)
        (cross_entropy / tokens + auxiliary / len(micro_batches)).backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    nn.utils.clip_grad_norm_(trained, 1.0)
    with torch.no_grad():
        for p in trained:
            assert p.grad is not None
            p -= RATE * p.grad
            p.grad = None


@torch.no_grad()
def _held_out(model: PreTrainedModel, batches: Any) -> float:
    micro_batches = list(batches)
    return sum(float(_losses(model, micro)[0]) for micro in micro_batches) / _tokens(micro_batches)
