"""Plans cover every weight once; they are audited, and every problem is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.meta_models import meta_model
from trainer.errors import PlanError
from trainer.tensor_parallel import TensorMapper, model_region, resolve_plan
from trainer.tensor_parallel.families import FAMILIES
from trainer.tensor_parallel.mapper import has_active_dropout
from trainer.tensor_parallel.units import Refused, ResolvedPart


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "gpt_bigcode", "codegen", "mixtral", "mamba2"])
def test_plans_cover_every_weight_once(model_type: str) -> None:
    """The shards with an owner cover each weight exactly, and every rank holds the same number of elements."""
    for ranks in (2, 4):
        if model_type == "codegen" and ranks == 4:
            continue  # four blocks of two heads
        model = meta_model(model_type)
        plans = [resolve_plan(model, {}, ranks, rank) for rank in range(ranks)]
        for same in zip(*(plan.entries for plan in plans), strict=True):
            covered = torch.zeros(same[0].shape, dtype=torch.int)
            for entry in same:
                for shard in entry.shards:
                    for _, full_index in shard.blocks():
                        covered[full_index] += shard.owner
            assert (covered == 1).all(), f"{same[0].name} on {ranks} ranks"
            assert len({tuple(p.local_shape() for p in entry.shards) for entry in same}) == 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("units", "ranks", "shared"), [(6, 4, False), (10, 8, False), (3, 2, True), (4, 6, True), (7, 6, False)]
)
def test_indivisible_units_are_refused(units: int, ranks: int, shared: bool) -> None:
    with pytest.raises(Refused, match=f"its {units} units of 5 cannot be divided by tensor {ranks}$"):
        ResolvedPart(units * 5, units, shared).share(0, ranks)


# The audit -----------------------------------------------------------------------------------------------------------


def plan_problems(model: PreTrainedModel, user: dict[str, str] | None = None, ranks: int = 2) -> list[str]:
    """Return the problems that the audit reports, one line each."""
    with pytest.raises(PlanError) as error:
        resolve_plan(model, user or {}, ranks, 0)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.fast
def test_unmatched_user_entry_is_reported() -> None:
    (message,) = plan_problems(meta_model("llama"), {"layers.*.self_atn.q_proj": "colwise:head_dim"})
    assert message.startswith("parallel.tensor_plan.layers.*.self_atn.q_proj: 'colwise:head_dim' matches no module")
    assert "did you mean 'layers.*.self_attn.q_proj'?" in message
    assert "model.named_modules()" in message


@pytest.mark.fast
def test_unknown_style_is_reported() -> None:
    (message,) = plan_problems(meta_model("llama"), {"layers.*.self_attn.q_proj": "colwize:head_dim"})
    assert message.startswith("parallel.tensor_plan.layers.*.self_attn.q_proj: 'colwize:head_dim' is not a style")
    assert "did you mean 'colwise'?" in message
    assert "packed_colwise" in message


@pytest.mark.fast
def test_unreadable_argument_is_reported() -> None:
    (message,) = plan_problems(meta_model("llama"), {"layers.*.self_attn.q_proj": "cut:first"})
    assert message.startswith("parallel.tensor_plan.layers.*.self_attn.q_proj: 'cut:first' cannot be read: ")
    assert "the style is written 'cut:dimension" in message


@pytest.mark.fast
def test_weight_without_entry_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", {k: v for k, v in FAMILIES["gpt2"].items() if k != "h.*.attn.c_attn"})
    messages = plan_problems(meta_model("gpt2", num_hidden_layers=1))
    weight, bias, unpaired = messages
    assert weight.startswith("parallel.tensor_plan.transformer.h.*.attn.c_attn.weight: ")
    assert "transformer.h.0.attn.c_attn.weight [64, 192] (Conv1D) has no entry in the tensor plan of gpt2" in weight
    assert weight.endswith("Add one to parallel.tensor_plan")
    assert "transformer.h.0.attn.c_attn.bias [192]" in bias
    assert "'rowwise' needs a sharded input" in unpaired
    assert "transformer.h.0.attn.c_proj.weight" in unpaired


@pytest.mark.fast
def test_unpaired_row_layer_is_reported() -> None:
    user = {"layers.*.mlp.up_proj": "replicate", "layers.*.mlp.gate_proj": "replicate"}
    (message,) = plan_problems(meta_model("llama", num_hidden_layers=1), user)
    assert message.startswith(
        "parallel.tensor_plan.model.layers.*.mlp.down_proj.weight: 'rowwise' needs a sharded input"
    )
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert "'colwise', or use 'rowwise_split_input'" in message


@pytest.mark.fast
def test_indivisible_sizes_name_the_largest_working_size() -> None:
    model = meta_model("llama", num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    messages = plan_problems(model, ranks=4)
    heads = next(message for message in messages if "q_proj" in message)
    assert heads.startswith("parallel.tensor: model.layers.0.self_attn.q_proj.weight [48, 48], 'colwise:head_dim': ")
    assert "its 6 units of 8 cannot be divided by tensor 4" in heads
    assert all(message.endswith("The largest size below that works for the whole model is 2") for message in messages)
    assert any("its 2 units of 8 cannot be divided by tensor 3" in message for message in plan_problems(model, ranks=3))
    deeper = plan_problems(
        meta_model("llama", num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, hidden_size=48), ranks=4
    )
    assert len(deeper) == len(set(deeper)) == len(messages)
    resolve_plan(model, {}, 2, 0)


@pytest.mark.fast
def test_tied_weights_with_different_shards_are_reported() -> None:
    model = meta_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    (message,) = plan_problems(model, {"embed_tokens": "embedding_colwise"})
    assert "lm_head.weight" in message
    assert "model.embed_tokens.weight" in message
    assert "'vocabulary_head' contradicts 'embedding_colwise'" in message
    assert message.endswith("Give both the same style")


@pytest.mark.fast
def test_plan_error_lists_every_problem() -> None:
    user = {"layers.*.mpl.up_proj": "colwise", "layers.*.mlp.down_proj": "rowise"}
    model = meta_model("llama", num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    message = "\n".join(plan_problems(model, user, ranks=4))
    for part in ("did you mean 'layers.*.mlp.up_proj'?", "did you mean 'rowwise'?", "its 6 units of 8"):
        assert part in message


def _install_in_sequence_parallel(model: PreTrainedModel) -> None:
    plan = resolve_plan(model, {}, 2, 0)
    mapper = TensorMapper(model, plan, model_region(model, None, 2, 0), lambda count: None, sequence_parallel=True)
    mapper.shard_parameters(model.parameters())
    mapper.install()


@pytest.mark.fast
def test_sequence_parallel_refuses_dropout_in_full_sequence_blocks() -> None:
    with pytest.raises(PlanError) as error:
        _install_in_sequence_parallel(meta_model("mixtral", attention_dropout=0.1))
    (message,) = [str(problem) for problem in error.value.problems]
    assert message.startswith(
        "parallel.sequence_parallel: model.layers.0.mlp needs full sequences, and dropout is active"
    )
    assert "dropout rates to 0, or sequence_parallel to false" in message
    _install_in_sequence_parallel(meta_model("mixtral", attention_dropout=0.0))
    _install_in_sequence_parallel(meta_model("llama", attention_dropout=0.1))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model_type", "fields", "active"),
    [
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("gpt_neox", {"classifier_dropout": 0.1}, False),  # of a head that a language model does not have
        ("gpt_neox", {"hidden_dropout": 0.1}, True),
        ("gpt2", {"summary_first_dropout": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False),
        ("gpt2", {}, True),
        ("mpt", {}, False),
        ("mpt", {"attn_config": {"attn_pdrop": 1}}, True),  # in a configuration of its own
    ],
)
def test_active_dropout_is_detected(model_type: str, fields: dict[str, Any], active: bool) -> None:
    assert has_active_dropout(meta_model(model_type, **fields)) == active
