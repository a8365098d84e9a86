"""Stages in DeepSpeed's pipeline engine: losses, gradients, memory, idle time and traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

from tests.configs import with_values
from tests.harness import run_ranks
from tests.training_jobs import losses_with_dropout, shared_weights_after
from tools.bench import pipeline
from tools.parity.__main__ import main
from tools.parity.shrink import tiny as tiny_model
from trainer.assembly import assemble
from trainer.compat.deepspeed.pipeline import instructions_of
from trainer.config.load import check_config
from trainer.config.schema import ParallelSection
from trainer.distributed import Launch, joined_world
from trainer.engine.pipeline import PipelineEngine
from trainer.topology import Topology


@pytest.mark.parametrize(
    ("model_type", "layouts"),
    [
        (
            "gpt2",  # tied
            [
                "pipeline=2,zero=0,accumulation=4",
                "pipeline=2,data=2,zero=1,accumulation=2",
                "pipeline=2,tensor=2,zero=1,accumulation=4",
                "pipeline=2,zero=1,accumulation=4,dualpipev=true",
            ],
        ),
        (
            "mixtral",
            [
                "pipeline=2,zero=1,accumulation=4",
                "pipeline=2,tensor=2,zero=0,accumulation=4",
                "pipeline=2,tensor=2,sequence_parallel=true,zero=0,accumulation=4,dualpipev=true",
            ],
        ),
    ],
)
def test_pipeline_layouts_equal_reference(
    model_type: str, layouts: list[str], tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare losses, norms with active clipping, every gradient, and parameters after three steps."""
    small = tiny_model(model_type, vocab_size=323, num_hidden_layers=4)
    wanted = {k: v for k, v in small.to_diff_dict().items() if v is not None and k not in ("dtype", "architectures")}
    wanted.pop("transformers_version", None)
    if model_type == "mixtral":
        wanted["output_router_logits"] = True
    config = with_values(tiny, model__config=wanted)
    (tmp_path / "config.json").write_text(json.dumps(config))
    status = main(["--config", str(tmp_path / "config.json"), "--layouts", *layouts])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "values",
    [
        {"deepspeed__zero_optimization": {"stage": 0}},
        {"deepspeed__zero_optimization": {"stage": 1}},
        {
            "deepspeed__zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            "deepspeed__data_types": {"grad_accum_dtype": "fp32"},
        },
    ],
)
def test_shared_parameters_stay_equal_in_bf16(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    config = with_values(
        tiny, model__config__tie_word_embeddings=True, parallel__pipeline=2, deepspeed__bf16={"enabled": True}, **values
    )
    first, last = run_ranks(shared_weights_after, 2, config, 3)
    assert first.keys() == last.keys() == {"model.embed_tokens.weight"}
    assert (first["model.embed_tokens.weight"] == last["model.embed_tokens.weight"]).all()


def test_pipeline_dropout_is_reproducible_from_seed(tiny: dict[str, Any]) -> None:
    config = with_values(tiny, parallel__pipeline=2, model__config__attention_dropout=0.2)
    first, second = (run_ranks(losses_with_dropout, 2, config, 3)[1] for _ in range(2))
    assert first == second
    assert first != run_ranks(losses_with_dropout, 2, with_values(config, model__config__attention_dropout=0.0), 3)[1]


def max_micro_batches_in_flight(config: dict[str, Any]) -> int:
    """Most micro-batches whose forward pass is done and whose backward pass is not, on this rank."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, pipeline=config["parallel"]["pipeline"])
    with joined_world(launch, topology, seed=1) as world:
        loaded = check_config(config, world_size=launch.world_size, device="cpu")
        trainer = assemble(loaded, world)
        engine = cast("PipelineEngine", trainer.engine)
        in_flight = maximum = 0
        instructions = instructions_of(engine.deepspeed_engine)
        for instruction, change in ((ForwardPass, 1), (BackwardPass, -1)):

            def executes(*args: Any, run: Any = instructions[instruction], change: int = change, **kwargs: Any) -> None:
                nonlocal in_flight, maximum
                run(*args, **kwargs)
                in_flight += change
                maximum = max(in_flight, maximum)

            instructions[instruction] = executes
        engine.train_step(trainer.batches.train.batch_at(1))
        assert in_flight == 0
        return maximum


def test_micro_batches_in_flight_per_stage(tiny: dict[str, Any]) -> None:
    config = with_values(
        tiny, model__config__num_hidden_layers=3, parallel__pipeline=3, deepspeed__train_micro_batch_size_per_gpu=1
    )
    assert run_ranks(max_micro_batches_in_flight, 3, config) == [3, 2, 1]


def test_idle_share_is_close_to_theory() -> None:
    ranks = run_ranks(pipeline.measure, 2, [pipeline.Case("llama", 2, 6, sleeps=True)])
    theory = ParallelSection(pipeline=2).bubble(6)
    assert sum(rank[0].idle for rank in ranks) / 2 < theory + 0.05  # 0.02 on a machine that does nothing else


def test_boundary_bytes_and_parameter_counts_equal_estimate() -> None:
    case = pipeline.Case("mixtral", 2, 3, layers=2)
    hidden, routers = 2 * 32 * 64 * 4, 2 * 2 * 32 * tiny_model("mixtral").num_local_experts * 4
    first, last = (rank[0] for rank in run_ranks(pipeline.measure, 2, [case]))
    assert first.sent == {(0, 1): 3 * (hidden + routers)}
    assert last.sent == {(1, 0): 3 * (hidden + routers)}
    assert (first.held, last.held) == (first.share, last.share)
