"""A resumed run equals the unbroken_run run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from tests.checkpoint.cases import (
    BF16,
    BF16_FP32,
    DROPOUT,
    OFFLOAD,
    SMALL_GROUPS,
    RunUnbroken,
    run_cli,
    run_config,
    validation_sources,
    with_resume,
)
from tests.checkpoint_jobs import read_state, scalar_state_in, train_and_save
from tests.commands import read_rows
from tests.configs import with_values
from tests.harness import run_ranks
from tools.parity.layout import Layout
from trainer.engine import ScalarState
from trainer.engine.state import DeepSpeedTrainingState

BITWISE = [
    ("llama", Layout(2, zero=3, changes=SMALL_GROUPS), DROPOUT),
    ("tied", Layout(2, pipeline=2, zero=1, changes=BF16), {}),
]


SLOW_BITWISE = [
    ("llama", Layout(2, zero=1), {}),
    ("llama", Layout(2), DROPOUT),
    ("llama", Layout(2, zero=1, changes=BF16), {}),
    ("tied", Layout(8, tensor=2, pipeline=2, zero=1), DROPOUT),
    ("llama", Layout(), DROPOUT),
    ("llama", Layout(2, zero=2), DROPOUT),
    ("llama", Layout(2, zero=3), DROPOUT),
    ("llama", Layout(2, changes=BF16), DROPOUT),
    ("llama", Layout(2, zero=1, changes=BF16_FP32), DROPOUT),
    ("llama", Layout(2, zero=1, changes=OFFLOAD), DROPOUT),
    ("llama", Layout(2, zero=3, changes=OFFLOAD), DROPOUT),
    ("llama", Layout(2, zero=2, changes=(*OFFLOAD, *BF16)), DROPOUT),
    ("llama", Layout(4, tensor=2, zero=1), DROPOUT),
    ("llama", Layout(2, tensor=2, sequence_parallel=True), DROPOUT),
    ("tied", Layout(2, pipeline=2, dualpipev=True), DROPOUT),
    ("tied", Layout(2, pipeline=2), DROPOUT),
    ("gpt2", Layout(2, tensor=2, zero=1), {}),
    ("mixtral", Layout(4, tensor=2, zero=2), {}),
]


@pytest.mark.parametrize(
    ("model", "layout", "values"),
    [*BITWISE, *(pytest.param(*row, marks=pytest.mark.matrix) for row in SLOW_BITWISE)],
    ids=lambda value: str(value) if isinstance(value, str | Layout) else "dropout" if value else "",
)
def test_resumed_run_equals_unbroken_run(
    model: str,
    layout: Layout,
    values: dict[str, Any],
    base: dict[str, Any],
    unbroken_run: RunUnbroken,
    tmp_path: Path,
) -> None:
    """In fresh processes, bit for bit: losses, weights, optimizer, counters; across the end of an epoch."""
    unbroken = unbroken_run(model, layout, **values)
    config = run_config(base, model, layout, tmp_path, checkpoint__resume=str(unbroken.checkpoint(3)), **values)
    losses = run_ranks(train_and_save, layout.world_size, config, 6, (6,))[0]
    assert losses == {step: loss for step, loss in unbroken.losses.items() if step > 3}
    last = tmp_path / "checkpoints" / "step-00000006"
    state, expected = read_state(last), read_state(unbroken.checkpoint(6))
    assert state.keys() == expected.keys()
    assert [key for key in expected if not state[key].equal(expected[key])] == []
    assert scalar_state_in(last) == scalar_state_in(unbroken.checkpoint(6))


@pytest.mark.fast
def test_fp16_loss_scale_round_trips() -> None:
    """Without training, which fp16 cannot do on CPUs: the state is that of DeepSpeed's scaler."""
    scaler = DynamicLossScaler(2**16, 2, 1.0, 2, False)
    engine = SimpleNamespace(
        global_steps=0,
        global_samples=0,
        skipped_steps=0,
        micro_steps=0,
        gradient_accumulation_steps=lambda: 1,
        lr_scheduler=None,
    )
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    inner.loss_scaler = scaler  # type: ignore[attr-defined]
    engine.optimizer = inner
    model = torch.nn.Linear(1, 1)
    state = DeepSpeedTrainingState(engine, None, [model], None)  # type: ignore[arg-type]
    vars(scaler).update(cur_scale=1024.0, cur_iter=7, last_overflow_iter=5, cur_hysteresis=1)
    saved = json.loads(json.dumps(vars(state.scalar_state())))
    expected = dict(vars(scaler))
    inner.loss_scaler = DynamicLossScaler(2**16, 2, 1.0, 2, False)  # type: ignore[attr-defined]
    assert vars(inner.loss_scaler) != expected
    state.load_scalar_state(ScalarState(**saved))
    assert vars(inner.loss_scaler) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="DeepSpeed has no fp16 on CPUs")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_run_resumes_with_its_loss_scale(stage: int, base: dict[str, Any], tmp_path: Path) -> None:
    """On one GPU, with an initial scale that overflows, so that steps are skipped before the checkpoint."""
    config = with_values(
        base,
        run__output_dir=str(tmp_path / "unbroken"),
        deepspeed__zero_optimization={"stage": stage},
        deepspeed__fp16={"enabled": True, "initial_scale_power": 26, "loss_scale_window": 3, "hysteresis": 1},
    )
    unbroken_losses = run_ranks(train_and_save, 1, config, 12, (6, 12))[0]
    sixth = tmp_path / "unbroken" / "checkpoints" / "step-00000006"
    assert scalar_state_in(sixth)["counters"]["skipped_steps"] > 0
    resumed = with_resume(with_values(config, run__output_dir=str(tmp_path / "resumed")), sixth)
    losses = run_ranks(train_and_save, 1, resumed, 12, (6, 12))[0]
    assert losses == pytest.approx({step: loss for step, loss in unbroken_losses.items() if step > 6}, rel=1e-3)
    for step in (6, 12):
        name = f"checkpoints/step-{step:08}"
        assert scalar_state_in(tmp_path / "resumed" / name) == scalar_state_in(tmp_path / "unbroken" / name)


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.matrix)])
def test_frozen_weights_are_saved_once(stage: int, base: dict[str, Any], tmp_path: Path) -> None:
    """By one rank, without optimizer state; and loaded at another ZeRO stage."""
    name = "model.embed_tokens.weight"
    config = with_values(base, deepspeed__zero_optimization={"stage": stage}, run__output_dir=str(tmp_path / "first"))
    losses = run_ranks(train_and_save, 2, config, 2, (1, 2), None, (), name)[0]
    folder = tmp_path / "first" / "checkpoints" / "step-00000001"
    saved = read_state(folder)
    assert f"weight/{name}" in saved
    assert f"exp_avg/{name}" not in saved
    assert saved[f"weight/{name}"].equal(read_state(folder.with_name("step-00000002"))[f"weight/{name}"])
    other = with_values(
        config,
        run__output_dir=str(tmp_path / "other"),
        checkpoint__resume=str(folder),
        deepspeed__zero_optimization={"stage": 4 - stage},
    )
    assert run_ranks(train_and_save, 2, other, 2, (1,), None, (), name)[0][2] == pytest.approx(losses[2], rel=1e-5)
    resaved = read_state(tmp_path / "other" / "checkpoints" / "step-00000001")
    assert resaved.keys() == saved.keys()
    assert all(resaved[key].equal(saved[key]) for key in saved)


def test_model_path_reads_weights_of_checkpoint(uploaded_run: Path, base: dict[str, Any], tmp_path: Path) -> None:
    """Without the optimizer state: a new run."""
    run = uploaded_run / "run"
    config = with_values(
        base,
        model__config=None,
        model__path=str(run / "checkpoints" / "step-00000006"),
        training__max_steps=2,
        training__log_every_steps=1,
        run__output_dir=str(tmp_path / "run"),
        data__validation=validation_sources(base),
        evaluation__max_batches=1,
    )
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    last_loss = [row["loss"] for row in read_rows(run) if row["split"] == "validation"][-1]
    first_loss = next(row["loss"] for row in read_rows(tmp_path / "run") if row["split"] == "validation")
    assert first_loss == pytest.approx(last_loss, rel=1e-6)
