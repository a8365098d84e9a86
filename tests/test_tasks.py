"""The task seam: a second task trained in the engine, the deferred output head, and collation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel

from tests.configs import LENGTH, VOCABULARY, with_values
from tests.harness import run_ranks
from tests.training_jobs import job_topology, load_job
from tools.parity.shrink import tiny as tiny_family
from trainer.assembly import assemble
from trainer.config import LoadedConfig
from trainer.config.load import check_config
from trainer.config.schema import DataSection
from trainer.config.tasks import TASK_FAMILIES, TaskFamilies
from trainer.data import open_batches, prepare_data
from trainer.distributed import Launch, joined_world
from trainer.model import build_model, initialize_weights, returns_head_output
from trainer.tasks import (
    IGNORE_INDEX,
    TASKS,
    Collation,
    MicroBatch,
    Needs,
    Prediction,
    Samples,
    TaskModule,
    TokenDocuments,
    count_targets,
    example_ids,
    pad_to_common_shape,
)
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.cross_entropy import LossSums, VocabularyCrossEntropy
from trainer.tasks.interface import Ids
from trainer.tasks.samples import ConcatenatedSamples
from trainer.topology import Topology

MASK_ID, STRIDE = 1, 5


class MaskedSamples(ConcatenatedSamples):
    def count_targets(self, numbers: Any) -> int:
        return len(numbers) * -(-LENGTH // STRIDE)


class MaskedLM:
    """Predict every fifth token, which the input replaces by a mask token. Implements `Task`."""

    name = "masked_lm"
    auto_class: type[Any] = AutoModelForMaskedLM
    needs = Needs.LOGITS
    forward_options: Mapping[str, object] = {}
    extra_sums: tuple[str, ...] = ("probability",)

    def open_samples(self, tokens: TokenDocuments, data: DataSection) -> Samples:
        return MaskedSamples(tokens, data.sequence_length, drop_last=True)

    def collate(self, rows: Sequence[Ids], collation: Collation) -> MicroBatch:
        ids_BT = torch.stack([torch.from_numpy(row[: collation.length]) for row in rows])
        is_masked = torch.arange(collation.length) % STRIDE == 0
        labels_BT = ids_BT.masked_fill(~is_masked, IGNORE_INDEX)
        return MicroBatch({"input_ids": ids_BT.masked_fill(is_masked, MASK_ID)}, labels_BT, count_targets(labels_BT))

    def example_inputs(self, model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
        return example_ids(model, batch, length)

    def loss(self, prediction: Prediction, labels: Tensor, cross_entropy: VocabularyCrossEntropy) -> LossSums:
        sums = cross_entropy(prediction.output.logits, labels)
        probability = torch.where(labels != IGNORE_INDEX, (-sums.target_losses).exp(), 0).sum()
        return sums._replace(extra={"probability": probability})

    def metrics(self, loss: float, extra: Mapping[str, float]) -> dict[str, float]:
        return dict(extra)


BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
STEPS = 2


def load_masked(config: dict[str, Any], world_size: int) -> LoadedConfig:
    """Register the task, and load a configuration that names it."""
    TASKS["masked_lm"] = MaskedLM()
    TASK_FAMILIES["masked_lm"] = TaskFamilies("MODEL_FOR_MASKED_LM_MAPPING", "masked language model", "", False)
    loaded = load_job(config, world_size)
    model = loaded.config.model.model_copy(update={"task": "masked_lm", "config": BERT})
    return replace(loaded, config=loaded.config.model_copy(update={"model": model}))


def train_masked(config: dict[str, Any]) -> tuple[list[float], dict[str, Any], float, Mapping[str, float]]:
    """Losses of some steps, final weights, and an evaluation before them, in this rank's world."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        trainer = assemble(load_masked(config, launch.world_size), world)
        batches, engine = trainer.batches, trainer.engine
        assert batches.validation is not None
        evaluation = engine.evaluate(batches.validation)
        losses = []
        for batch in batches.train.steps(1, STEPS):
            rows = engine.all_gather_scalars([engine.train_step(batch).loss_sum])
            losses.append(sum(row[0] for row in rows) / batch.tokens)
        weights = {name: tensor.float().numpy().copy() for name, tensor in engine.full_weights()}
    return losses, weights, evaluation.loss, evaluation.metrics


def train_masked_bare(config: dict[str, Any]) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """The same by torch and Hugging Face alone: losses, final and initial weights."""
    loaded = load_masked(config, 1)
    batches = open_batches(loaded, prepare_data(loaded), Topology.of(1, 0)).train
    model = build_model(loaded)
    initialize_weights(model, loaded.config.run.seed)
    initial = {name: parameter.detach().clone().numpy() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=config["deepspeed"]["optimizer"]["params"]["lr"])
    losses = []
    for batch in batches.steps(1, STEPS):
        logits = torch.cat([model(**micro.inputs).logits for micro in batch.micro_batches])
        labels = torch.cat([micro.labels for micro in batch.micro_batches])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}, initial


# A second task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "values"),
    [
        (1, {}),
        (2, {"parallel__tensor": 2}),
        (2, {"parallel__pipeline": 2, "deepspeed__zero_optimization": {"stage": 1}}),
        (2, {"deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
    ],
    ids=["one process", "tensor 2", "pipeline 2", "ZeRO-3"],
)
def test_masked_lm_trains_as_plain_torch(world_size: int, values: dict[str, Any], tiny: dict[str, Any]) -> None:
    """Plain SGD at rate 1, so that each weight's change is the sum of its gradients."""
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    config = with_values(tiny, model__config=BERT, deepspeed__optimizer=sgd, deepspeed__gradient_clipping=0.0)
    (expected, weights, initial) = run_ranks(train_masked_bare, 1, config)[0]
    for losses, actual, evaluation_loss, metrics in run_ranks(train_masked, world_size, with_values(config, **values)):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert actual.keys() >= weights.keys()
        for name, weight in weights.items():
            change = abs(weight - initial[name]).max()
            assert abs(actual[name] - weight).max() <= 1e-4 * change + 1e-6, name
        assert metrics.keys() == {"probability"}
        assert 0 < metrics["probability"] < 1
        assert metrics["probability"] >= torch.tensor(-evaluation_loss).exp()  # Jensen's inequality


# The output head ------------------------------------------------------------------------------------------------------


class ChunkedLM(CausalLM):
    """Never has the logits of more than 5 tokens."""

    def __init__(self) -> None:
        self.head_calls = 0

    def loss(self, prediction: Prediction, labels: Tensor, cross_entropy: VocabularyCrossEntropy) -> LossSums:
        hidden_ND = prediction.hidden.flatten(0, -2)
        parts = []
        for hidden, chunk in zip(hidden_ND.split(5), labels.flatten().split(5), strict=True):
            self.head_calls += 1
            parts.append(cross_entropy(prediction.head(hidden[None]), chunk[None]))
        loss, objective = (sum(values) for values in zip(*(part[:2] for part in parts), strict=True))
        return LossSums(loss, objective, torch.cat([part.target_losses[0] for part in parts]).view(labels.shape))


def tiny_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return CausalLM.auto_class.from_config(tiny_family(model_type), attn_implementation="eager")


@pytest.mark.fast
@pytest.mark.parametrize("can_defer_head", [True, False])
@pytest.mark.parametrize("task", [CausalLM(), ChunkedLM()], ids=["all tokens", "chunks"])
def test_deferred_head_has_gradients_of_hugging_face(task: CausalLM, can_defer_head: bool) -> None:
    model = tiny_model("mixtral")
    ids = torch.randint(5, 250, (2, 9))
    output = model(input_ids=ids[:, :-1], output_router_logits=True)
    loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") + output.aux_loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    logits = output.logits.detach()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0
    module = TaskModule(model, task, VocabularyCrossEntropy(), can_defer_head=can_defer_head)
    result = module(ids[:, 1:], input_ids=ids[:, :-1])
    actual = torch.autograd.grad(result.objective + result.auxiliary, list(model.parameters()))
    assert float(result.loss_sum + result.auxiliary.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(input_ids=ids[:, :-1]).logits, logits), "outside the module the head computes as before"


@pytest.mark.fast
def test_deferred_head_never_computes_logits_in_the_model() -> None:
    task, model = ChunkedLM(), tiny_model("llama")
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    module = TaskModule(model, task, VocabularyCrossEntropy(), can_defer_head=True)
    ids = torch.randint(5, 250, (2, 8))
    module(ids, input_ids=ids)
    assert (sizes, task.head_calls) == ([0], 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", True), ("gpt2", True), ("mixtral", True), ("gemma2", False), ("granite", False), ("cohere", False)],
)
def test_head_output_is_final_where_family_changes_no_logits(
    model_type: str, expected: bool, tiny: dict[str, Any]
) -> None:
    loaded = check_config(tiny, world_size=1, device="cpu")
    with torch.device("meta"):
        model = CausalLM.auto_class.from_config(tiny_family(model_type))
    assert returns_head_output(model, loaded) is expected
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not returns_head_output(tiny_model("llama"), loaded), "a model with values is not traced"


# Micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_padding_to_common_shape_keeps_losses() -> None:
    rows = [torch.arange(10, 10 + length).numpy() for length in (4, 7, 9)]
    collation = Collation(length=8, pad_id=0, pad_to_multiple_of=1, mask_padding=True)
    micro_batches = [CausalLM().collate(chosen, collation) for chosen in (rows[:2], rows[2:] * 3)]
    assert [sorted(micro.inputs) for micro in micro_batches] == [["attention_mask", "input_ids"], ["input_ids"]]
    padded = pad_to_common_shape(micro_batches, min_count=4)
    assert [micro.num_targets for micro in padded] == [9, 24, 0, 0]
    assert {tuple(t.shape) for micro in padded for t in (*micro.inputs.values(), micro.labels)} == {(3, 8)}
    module = TaskModule(tiny_model("llama").eval(), CausalLM(), VocabularyCrossEntropy())
    for micro, wide in zip(micro_batches, padded, strict=False):
        expected, actual = (float(module(m.labels, **m.inputs).loss_sum) for m in (micro, wide))
        assert actual == pytest.approx(expected, rel=1e-6)
    assert float(module(padded[-1].labels, **padded[-1].inputs).loss_sum) == 0


@pytest.mark.fast
def test_configuration_and_implementations_have_the_same_tasks() -> None:
    assert TASKS.keys() == TASK_FAMILIES.keys()
    for task in TASKS.values():
        assert set(task.extra_sums).isdisjoint({"loss", "tokens"})
