"""Causality probe: models that see later tokens are refused in every layout, and others are not."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from launch.train import train as train_command
from tests.configs import LENGTH, VOCABULARY, tiny_config, with_values
from tests.harness import run_command, run_ranks
from tests.test_model import GPT2, MIXTRAL
from tests.training_jobs import job_topology, load_job
from trainer import causality
from trainer.assembly import plan_model
from trainer.causality import CONTROL, PROBED, Finding, verify_causality
from trainer.checkpoint_format import read_manifest
from trainer.config.causal_attention import make_causal
from trainer.config.earlier_versions import METADATA_KEY
from trainer.config.load import check_config, load_config
from trainer.config.model_config import model_config
from trainer.data import open_batches, prepare_data
from trainer.data.tokenizer import train_tokenizer
from trainer.distributed import Launch, ProcessGroups, World, joined_world, seed_everything
from trainer.engine import build_engine
from trainer.engine.plain import PlainEngine
from trainer.errors import ConfigError
from trainer.fault_tolerance import StopRequests
from trainer.model import build_model
from trainer.tasks import MicroBatch
from trainer.topology import Topology

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")

BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MAMBA = {"model_type": "mamba", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
RECURRENT = {
    "model_type": "recurrent_gemma",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "lru_width": 32,
    "attention_window_size": 8,
}
BF16 = {"enabled": True}

Job = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs") / "run")
    return with_values(config, data__validation=[], model__config__num_hidden_layers=4)


@pytest.fixture(scope="module")
def bert(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained folder of an encoder."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    BertLMHeadModel(BertConfig(**BERT)).save_pretrained(folder)
    train_tokenizer(iter((corpus / "train.jsonl").read_text().splitlines()[:50]), VOCABULARY, folder)
    return folder


# On ranks -------------------------------------------------------------------------------------------------------------


def examine(jobs: list[Job]) -> list[Any]:
    """What comes of each job, in one world: the probe's error or log line, or the losses with and without it.

    A job is (how, configuration); `maskless` drops Llama's causal mask, `curve` trains.
    """
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(jobs[0][1], launch), seed=jobs[0][1]["run"]["seed"]) as world:
        return [
            [_curve(config, launch, world, probed=probed) for probed in (False, True)]
            if how == "curve"
            else _probe(config, launch, world, maskless=how == "maskless")
            for how, config in jobs
        ]


def _start(config: dict[str, Any], launch: Launch, world: World) -> tuple[Any, Any, Any]:
    loaded = load_job(config, launch.world_size)
    data = prepare_data(loaded, launch, world.store)
    engine = build_engine(build_model(loaded, data.tokenizer), loaded, world, plan_model(loaded).assignment)
    return loaded, engine, open_batches(loaded, data, world.topology).train


def _probe(config: dict[str, Any], launch: Launch, world: World, *, maskless: bool) -> str:
    from transformers.models.llama import modeling_llama

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    causality.log.addHandler(handler)
    causality.log.setLevel(logging.INFO)
    create_mask = modeling_llama.create_causal_mask
    if maskless:
        modeling_llama.create_causal_mask = _mask_of_ones
    try:
        loaded, engine, batches = _start(config, launch, world)
        verify_causality(loaded, world, engine, batches)
        return "\n".join(lines)
    except ConfigError as error:
        return f"refused: {error}"
    finally:
        modeling_llama.create_causal_mask = create_mask
        causality.log.removeHandler(handler)


def _mask_of_ones(inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
    batch, length = inputs_embeds.shape[:2]
    return torch.ones(batch, 1, length, length, dtype=torch.bool, device=inputs_embeds.device)


def _curve(config: dict[str, Any], launch: Launch, world: World, *, probed: bool) -> list[float]:
    loaded, engine, batches = _start(config, launch, world)
    torch.manual_seed(5)
    if probed:
        verify_causality(loaded, world, engine, batches)
    found = [float(torch.rand(()))]
    for step, batch in enumerate(batches.steps(1, 3), start=1):
        world.seed_step(step)
        result = engine.train_step(batch)
        found += [float(result.loss_sum), float(result.grad_norm)]
    return found


def counted_run(config: dict[str, Any]) -> int:
    """Trains as the command does; how often the probe has asked for losses."""
    asked = []
    target_losses = PlainEngine.target_losses

    def count(engine: PlainEngine, micro_batch: MicroBatch) -> Any:
        asked.append(micro_batch)
        return target_losses(engine, micro_batch)

    PlainEngine.target_losses = count  # type: ignore[method-assign]
    launch = Launch.from_environment()
    train_command(load_job(config, launch.world_size), launch, StopRequests(launch.rank))
    return len(asked)


# Refused and not refused ----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor": (2, {"parallel__tensor": 2}),
    "pipeline": (2, {"parallel__pipeline": 2, "deepspeed__zero_optimization": {"stage": 1}}),
    "ZeRO-3": (2, {"deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__sequence_parallel": True, "data__packing": "none"},
    "pipeline": {"parallel__pipeline_schedule": "dualpipev", "deepspeed__train_micro_batch_size_per_gpu": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bidirectional_models_are_refused(layout: str, base: dict[str, Any], bert: Path) -> None:
    """And a run in the same layout that is not refused computes, dropout included, what it does without the probe."""
    world, values = LAYOUTS[layout]
    config = with_values(base, **values)
    of_bert = with_values(config, model={"path": str(bert)})
    configs = [config, *([with_values(config, **VARIANTS[layout])] if layout in VARIANTS else [])]
    jobs = [(how, one) for how in ("maskless", "probe") for one in configs]
    curve = with_values(config, model={"config": GPT2})
    ranks = run_ranks(examine, world, [("probe", of_bert), *jobs, ("curve", curve)])
    for red, *found, (without, probed) in ranks:
        assert red.startswith("refused: model.path: 'bert' sees later tokens")
        assert "with the inputs from position 24 on replaced, the loss at position" in red
        assert f"Set is_decoder to true in {bert}/config.json" in red
        for text in found[: len(configs)]:
            assert text.startswith("refused: model.config: 'llama' sees later tokens")
            assert "Take another family" in text
        for text in found[len(configs) :]:
            assert text.startswith("causality probed in")
        assert probed == without
    assert len({tuple(found[: 1 + len(configs)]) for found in ranks}) == 1, "all ranks raise the same error"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_causal_models_are_not_refused(precision: str, base: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    config = with_values(base, deepspeed__bf16=BF16) if precision == "bf16" else base
    model = AutoModelForCausalLM.from_pretrained(bert)
    make_causal(model.config)
    model.save_pretrained(tmp_path)
    train_tokenizer(iter(["some text"]), VOCABULARY, tmp_path)
    models = [*({"config": one} for one in (GPT2, MIXTRAL, MAMBA, RECURRENT, BERT)), {"path": str(tmp_path)}]
    jobs = [("probe", with_values(config, model=one)) for one in models]
    bidirectional = with_values(config, model={"config": {**BERT, "is_decoder": False}})
    *found, refused = run_ranks(examine, 1, [*jobs, ("probe", bidirectional)])[0]
    for text in found:
        assert text.startswith("causality probed in")
        assert "depends on later tokens" in text
    assert refused.startswith("refused: model.config.is_decoder: 'bert' sees later tokens")
    assert refused.endswith("Set it to true"), "random weights leak little, and are refused in bf16 too"


@pytest.mark.fast
def test_remedy_for_hub_name_is_actionable(tmp_path: Path) -> None:
    def remedy(path: str) -> str | None:
        facts = SimpleNamespace(model_type="bert", causal_setting=("is_decoder", True))
        loaded: Any = SimpleNamespace(facts=facts, config=SimpleNamespace(model=SimpleNamespace(path=path)))
        return causality._problem(loaded, Finding(1, 2.0, 3.0, 1.0, True), 24).remedy

    of_hub = remedy("bert-base-uncased")
    assert of_hub is not None
    assert of_hub.startswith("Download the folder, set is_decoder to true in its config.json and give its path")
    of_folder = remedy(str(tmp_path))
    assert of_folder is not None
    assert of_folder.startswith(f"Set is_decoder to true in {tmp_path}/config.json")


def test_command_reports_bidirectional_model_once(base: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(with_values(base, model={"path": str(bert)}, run__output_dir=str(tmp_path / "run"))))
    ended = run_command(TRAIN, "--config", str(path), world=2)
    assert ended.status == 2, ended.err
    assert "".join(ended.errors).count("'bert' sees later tokens") == 1
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "config.json").exists()


def test_resumed_run_is_not_probed(base: dict[str, Any], tmp_path: Path) -> None:
    """A model that is made causal says so wherever it is rebuilt from."""
    config = with_values(base, model={"config": BERT}, run__output_dir=str(tmp_path), checkpoint={"every_steps": 2})
    asked = [run_ranks(counted_run, 1, with_values(config, training__max_steps=steps))[0] for steps in (2, 3)]
    assert asked == [2, 0]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["config"]["is_decoder"] is True
    assert json.loads((tmp_path / "final" / "config.json").read_text())["is_decoder"] is True
    assert read_manifest(tmp_path / "checkpoints" / "step-00000002").model["config"]["is_decoder"] is True


# The configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BERT, {"is_decoder": True}),
        ({**BERT, "is_decoder": False}, {"is_decoder": False}),
        ({"model_type": "xlm", "vocab_size": 320, "emb_dim": 32, "n_layers": 2, "n_heads": 4}, {"causal": True}),
        (GPT2, {}),
    ],
    ids=["bert", "bert explicit", "xlm", "gpt2"],
)
def test_random_weights_default_to_causal(
    config: dict[str, Any], expected: dict[str, bool], tiny: dict[str, Any]
) -> None:
    loaded = check_config(with_values(tiny, model={"config": config}), world_size=1, device="cpu")
    resolved = loaded.resolved()["model"]["config"]
    assert resolved == config | expected
    for key, value in expected.items():
        assert getattr(model_config(loaded.config.model), key) is value
        assert (loaded.facts.causal_setting is None) == value


@pytest.mark.fast
def test_resumed_run_keeps_bidirectional_setting(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Its stored configuration lacks the key; a run of another family in its place hears nothing of it."""
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(with_values(tiny, model={"config": BERT}, run__output_dir=str(run))))
    stored = load_config(path, world_size=1, device="cpu").resolved()
    del stored["model"]["config"]["is_decoder"]
    run.mkdir()
    (run / "config.json").write_text(json.dumps(stored | {METADATA_KEY: {}}))
    resumed = load_config(path, world_size=1, device="cpu")
    assert model_config(resumed.config.model).is_decoder is False
    assert resumed.resolved()["model"]["config"]["is_decoder"] is False
    path.write_text(json.dumps(with_values(tiny, run__output_dir=str(run))))
    assert "is_decoder" not in load_config(path, world_size=1, device="cpu").resolved()["model"]["config"]


# The sample and the verdict -------------------------------------------------------------------------------------------


class _Stub:
    """An engine that returns fixed losses, and the batches of a run."""

    def __init__(self, passes: list[torch.Tensor], ids: Any) -> None:
        self.passes, self.ids, self.asked = passes, ids, list[MicroBatch]()

    def target_losses(self, micro_batch: MicroBatch) -> torch.Tensor:
        self.asked.append(micro_batch)
        return self.passes[len(self.asked) - 1]

    def all_gather_scalars(self, values: list[float]) -> list[list[float]]:
        return [[0.0] * len(values), values]

    def first_ids(self) -> Any:
        return self.ids


def asked(config: dict[str, Any], ids: Any, passes: list[torch.Tensor] | None = None) -> list[MicroBatch]:
    """The micro-batches that the probe runs, over losses that say nothing unless `passes` do."""
    topology = Topology.of(1, 0)
    groups = ProcessGroups(topology, HashStore())
    world = World(topology, topology, torch.device("cpu"), 1, HashStore(), groups)
    stub = _Stub(passes or [torch.ones(2, 4096)] * 2, np.array(ids, dtype=np.int64))
    verify_causality(check_config(config, world_size=None, device="cpu"), world, stub, stub)  # type: ignore[arg-type]
    return stub.asked


@pytest.mark.fast
def test_probe_replaces_last_quarter_of_first_sample(tiny: dict[str, Any]) -> None:
    ids = list(range(10, 10 + LENGTH + 1))
    original, changed = asked(tiny, ids)
    assert original.inputs["input_ids"].tolist() == [ids[:-1]] * 2
    assert original.labels.tolist() == changed.labels.tolist() == [ids[1:]] * 2
    assert changed.inputs["input_ids"][CONTROL].tolist() == ids[:-1]
    same = (changed.inputs["input_ids"][PROBED] == original.inputs["input_ids"][PROBED]).tolist()
    assert same == [True] * 24 + [False] * 8
    assert 0 <= int(changed.inputs["input_ids"].min()) <= int(changed.inputs["input_ids"].max()) < VOCABULARY
    assert original.inputs.get("attention_mask") is None
    assert torch.equal(asked(tiny, ids)[1].inputs["input_ids"], changed.inputs["input_ids"])
    long = with_values(tiny, data__sequence_length=64)
    assert asked(long, range(65))[0].inputs["input_ids"].shape == (2, 64)
    (padded, _) = asked(with_values(tiny, data__packing="none"), ids[:14])
    assert padded.inputs.get("attention_mask") is not None
    assert padded.inputs.get("attention_mask").tolist() == [[1] * 12 + [0]] * 2


@pytest.mark.fast
def test_short_samples_are_extended_or_skipped(tiny: dict[str, Any]) -> None:
    original, changed = asked(tiny, [7, 8, 9])
    assert original.inputs["input_ids"].shape == (2, LENGTH), "random ids where the data has too few"
    assert not torch.equal(original.inputs["input_ids"], changed.inputs["input_ids"])
    short = with_values(tiny, data__sequence_length=3)
    assert asked(short, [7, 8, 9, 10])[0].inputs["input_ids"].tolist() == [[7, 8, 9]] * 2
    assert asked(with_values(tiny, data__sequence_length=1), [7, 8]) == []
    cut = with_values(tiny, parallel={"tensor": 4, "sequence_parallel": True})
    assert asked(cut, range(15))[0].inputs["input_ids"].shape == (2, 12)
    assert asked(with_values(cut, data__sequence_length=4), range(4))[0].inputs["input_ids"].shape == (2, 4)


@pytest.mark.fast
def test_probe_is_long_enough_for_block_sparse_attention(tiny: dict[str, Any]) -> None:
    big_bird = {**BERT, "model_type": "big_bird", "max_position_embeddings": 2048}
    config = with_values(tiny, model={"config": big_bird}, data__sequence_length=1024)
    assert asked(config, range(200))[0].inputs["input_ids"].shape == (2, 705), (
        "a shorter one would turn it off for good"
    )
    assert check_config(config, world_size=1, device="cpu").facts.causal_setting == ("attention_type", "original_full")


def changed_losses(changes: dict[tuple[int, int], float]) -> list[torch.Tensor]:
    before = torch.full((2, LENGTH), 5.0)
    after = before.clone()
    for place, change in changes.items():
        after[place] += change
    return [before, after]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("precision", "changes", "outcome"),
    [
        ("fp32", {}, "no loss"),
        ("fp32", {(PROBED, 9): 4e-5}, "no loss"),
        ("fp32", {(PROBED, 24): 1.0}, "no loss"),
        ("fp32", {(PROBED, 9): 6e-5}, "position 9 goes from 5 to 5.00006"),
        ("fp32", {(PROBED, 23): -1.0}, "position 23 goes from 5 to 4 (largest change of a loss: 1)"),
        ("fp32", {(PROBED, 9): 1.0, (CONTROL, 3): 6e-5}, "cannot be probed"),
        ("fp32", {(PROBED, 9): float("nan"), (CONTROL, 9): float("nan")}, "cannot be probed"),
        ("bf16", {(PROBED, 9): 4e-3}, "no loss"),
        ("bf16", {(PROBED, 9): 6e-3}, "position 9"),
        ("bf16", {(PROBED, n): 4e-3 for n in range(4, 16)}, "position 4"),
        ("bf16", {**{(PROBED, n): 4e-3 for n in range(4, 16)}, (CONTROL, 1): 1e-3}, "no loss"),
    ],
)
def test_probe_verdict(
    precision: str,
    changes: dict[tuple[int, int], float],
    outcome: str,
    tiny: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = with_values(tiny, deepspeed__bf16=BF16) if precision == "bf16" else tiny
    caplog.set_level(logging.INFO, "trainer")
    causality.log.propagate = True
    logging.getLogger("trainer").propagate = True
    refused = ""
    try:
        asked(config, range(LENGTH + 1), changed_losses(changes))
    except ConfigError as error:
        refused = str(error)
    assert outcome in (refused or caplog.text)
    assert bool(refused) == outcome.startswith("position")


@pytest.mark.fast
def test_probe_preserves_random_state() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    seed_everything(1, Topology.of(1, 0))
    expected = draws()
    seed_everything(1, Topology.of(1, 0))
    with causality._preserved_random_state(torch.device("cpu")):
        draws()
    assert draws() == expected
