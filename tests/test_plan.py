"""Shards cover every weight once; plans are audited, and every problem is named."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.parity.shrink import tiny
from trainer.errors import PlanError
from trainer.sharding import Shard
from trainer.tensor_parallel import TensorMapper, read_plan
from trainer.tensor_parallel.families import FAMILIES
from trainer.tensor_parallel.mapper import has_active_dropout
from trainer.tensor_parallel.units import Part, Refused, Share


def _random_pieces(draw: random.Random) -> tuple[tuple[int, ...], int, int, list[Part]]:
    """A weight's shape, the dimension it is cut along, the ranks, and the parts it consists of."""
    ranks = draw.choice([1, 2, 3, 4, 8])
    parts = []
    for _ in range(draw.randint(1, 4)):
        shared = draw.random() < 0.4
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        units = draw.choice(divisors) if shared else ranks * draw.randint(1, 3)
        parts.append(Part(units * draw.randint(1, 3), units, shared))
    dim, rest = draw.randrange(3), [draw.randint(1, 4) for _ in range(2)]
    shape = [*rest[:dim], sum(part.size for part in parts), *rest[dim:]]
    return tuple(shape), dim, ranks, parts


def _shards(shape: tuple[int, ...], dim: int, ranks: int, rank: int, parts: list[Part]) -> list[Shard]:
    """One for each part; neighbours that are cut alike in one."""
    found: list[tuple[Share, list[int], int]] = []
    start = 0
    for part in parts:
        place = part.place(ranks, rank)
        if found and found[-1][0] == place:
            found[-1][1].append(part.size)
        else:
            found.append((place, [part.size], start))
        start += part.size
    return [Shard("w", shape, dim, packed=tuple(sizes), start=at, **vars(share)) for share, sizes, at in found]


@pytest.mark.fast
def test_shards_cover_every_weight_once() -> None:
    draw = random.Random(1)
    for _ in range(400):
        shape, dim, ranks, parts = _random_pieces(draw)
        whole = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
        covered, joined, local_sizes = torch.zeros(shape[dim], dtype=torch.int), torch.full(shape, torch.nan), Counter()
        for rank in range(ranks):
            shards = _shards(shape, dim, ranks, rank, parts)
            for number, shard in enumerate(shards):
                local = shard.extract(whole)
                assert tuple(local.shape) == shard.local_shape()
                assert local.data_ptr() != whole.data_ptr()
                local_sizes[number, local.shape[dim]] += 1
                for here, there in shard.ranges():
                    covered[there] += shard.owner
                    assert torch.equal(
                        local.narrow(dim, here.start, here.stop - here.start),
                        whole.narrow(dim, there.start, there.stop - there.start),
                    )
                shard.insert(local, joined)
        assert torch.equal(joined, whole)
        assert (covered == 1).all()
        assert set(local_sizes.values()) == {ranks}, "ranks hold equally large parts"


@pytest.mark.fast
def test_padded_shards_cover_every_row_once() -> None:
    for size, ranks, dim in itertools.product((1, 2, 5, 10, 16, 259), (1, 2, 3, 4, 8), (0, 1)):
        shape = (size, 3) if dim == 0 else (3, size)
        whole = torch.randn(shape)
        joined, covered = torch.full(shape, torch.nan), torch.zeros(size, dtype=torch.int)
        for rank in range(ranks):
            shard = Shard("w", shape, dim, rank, ranks, (size,))
            local = shard.extract(whole)
            assert tuple(local.shape) == shard.local_shape()
            assert local.shape[dim] == -(-size // ranks)
            ((here, there),) = shard.ranges()
            covered[there] += 1
            assert not local.narrow(dim, here.stop, local.shape[dim] - here.stop).any(), "padding is zero"
            shard.insert(local + 0.0, joined)
        assert torch.equal(joined, whole)
        assert (covered == 1).all()


@pytest.mark.fast
def test_full_shard_is_the_tensor_itself() -> None:
    for shape in ((), (3,), (2, 5)):
        shard = Shard.full("w", shape, owner=True)
        whole, joined = torch.randn(shape), torch.full(shape, torch.nan)
        assert shard.is_full
        assert shard.local_shape() == shape
        shard.insert(shard.extract(whole), joined)
        assert torch.equal(joined, whole)


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "gpt_bigcode", "codegen", "mixtral", "mamba2"])
def test_plans_cover_every_weight_once(model_type: str) -> None:
    """Of all ranks' pieces, those that count cover each weight exactly; and every rank holds as much."""
    for ranks in (2, 4):
        if model_type == "codegen" and ranks == 4:
            continue  # four blocks of two heads
        model = meta(model_type)
        plans = [read_plan(model, {}, ranks, rank) for rank in range(ranks)]
        for same in zip(*(plan.entries for plan in plans), strict=True):
            covered = torch.zeros(same[0].shape, dtype=torch.int)
            for entry in same:
                for shard in entry.shards:
                    for _, there in shard.ranges():
                        covered.narrow(shard.dim, there.start, there.stop - there.start).add_(shard.owner)
            assert (covered == 1).all(), f"{same[0].name} on {ranks} ranks"
            assert len({tuple(p.local_shape() for p in entry.shards) for entry in same}) == 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("units", "ranks", "shared"), [(6, 4, False), (10, 8, False), (3, 2, True), (4, 6, True), (7, 6, False)]
)
def test_indivisible_units_are_refused(units: int, ranks: int, shared: bool) -> None:
    with pytest.raises(Refused, match=f"its {units} units of 5 cannot be divided by tensor {ranks}$"):
        Part(units * 5, units, shared).place(ranks, 0)


# The audit -----------------------------------------------------------------------------------------------------------


def meta(model_type: str, **fields: Any) -> PreTrainedModel:
    """A tiny model without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny(model_type, **fields))
    return model


def problems(model: PreTrainedModel, user: dict[str, str] | None = None, ranks: int = 2) -> list[str]:
    """What the audit says, a line each."""
    with pytest.raises(PlanError) as refused:
        read_plan(model, user or {}, ranks, 0)
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.fast
def test_unmatched_user_entry_is_reported() -> None:
    (said,) = problems(meta("llama"), {"layers.*.self_atn.q_proj": "colwise:head_dim"})
    assert said.startswith("parallel.tensor_plan.layers.*.self_atn.q_proj: 'colwise:head_dim' matches no module")
    assert "did you mean 'layers.*.self_attn.q_proj'?" in said
    assert "model.named_modules()" in said


@pytest.mark.fast
def test_unknown_style_is_reported() -> None:
    (said,) = problems(meta("llama"), {"layers.*.self_attn.q_proj": "colwize:head_dim"})
    assert said.startswith("parallel.tensor_plan.layers.*.self_attn.q_proj: 'colwize:head_dim' is not a style")
    assert "did you mean 'colwise'?" in said
    assert "packed_colwise" in said


@pytest.mark.fast
def test_weight_without_entry_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", {k: v for k, v in FAMILIES["gpt2"].items() if k != "h.*.attn.c_attn"})
    found = problems(meta("gpt2", num_hidden_layers=1))
    weight, bias, lonely = found
    assert weight.startswith("parallel.tensor_plan.transformer.h.*.attn.c_attn.weight: ")
    assert "transformer.h.0.attn.c_attn.weight [64, 192] (Conv1D) has no row in the tensor plan of gpt2" in weight
    assert weight.endswith("Add one to parallel.tensor_plan")
    assert "transformer.h.0.attn.c_attn.bias [192]" in bias
    assert "'rowwise' expects an input that is cut" in lonely
    assert "transformer.h.0.attn.c_proj.weight" in lonely


@pytest.mark.fast
def test_unpaired_row_layer_is_reported() -> None:
    user = {"layers.*.mlp.up_proj": "replicate", "layers.*.mlp.gate_proj": "replicate"}
    (said,) = problems(meta("llama", num_hidden_layers=1), user)
    assert said.startswith("parallel.tensor_plan.model.layers.*.mlp.down_proj.weight: 'rowwise' expects an input")
    assert "model.layers.0.mlp.down_proj.weight" in said
    assert "'colwise', or take 'rowwise_split_input'" in said


@pytest.mark.fast
def test_indivisible_sizes_name_the_largest_working_size() -> None:
    model = meta("llama", num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    found = problems(model, ranks=4)
    heads = next(said for said in found if "q_proj" in said)
    assert heads.startswith("parallel.tensor: model.layers.0.self_attn.q_proj.weight [48, 48], 'colwise:head_dim': ")
    assert "its 6 units of 8 cannot be divided by tensor 4" in heads
    assert all(said.endswith("The largest size below that works for the whole model is 2") for said in found)
    assert any("its 2 units of 8 cannot be divided by tensor 3" in said for said in problems(model, ranks=3))
    deeper = problems(
        meta("llama", num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, hidden_size=48), ranks=4
    )
    assert len(deeper) == len(set(deeper)) == len(found)
    read_plan(model, {}, 2, 0)


@pytest.mark.fast
def test_tied_weights_with_different_shards_are_reported() -> None:
    model = meta("llama", num_hidden_layers=1, tie_word_embeddings=True)
    (said,) = problems(model, {"embed_tokens": "embedding_colwise"})
    assert "lm_head.weight" in said
    assert "model.embed_tokens.weight" in said
    assert "'vocabulary_head' does not agree with 'embedding_colwise'" in said
    assert said.endswith("Give both the same cut")


@pytest.mark.fast
def test_plan_error_lists_every_problem() -> None:
    user = {"layers.*.mpl.up_proj": "colwise", "layers.*.mlp.down_proj": "rowise"}
    model = meta("llama", num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    said = "\n".join(problems(model, user, ranks=4))
    for part in ("did you mean 'layers.*.mlp.up_proj'?", "did you mean 'rowwise'?", "its 6 units of 8"):
        assert part in said


def _install_in_sequence_parallel(model: PreTrainedModel) -> None:
    plan = read_plan(model, {}, 2, 0)
    mapper = TensorMapper(model, plan, None, 2, 0, lambda count: None, sequence_parallel=True)
    mapper.shard_parameters(model.parameters())
    mapper.install()


@pytest.mark.fast
def test_sequence_parallel_refuses_dropout_in_full_sequence_blocks() -> None:
    with pytest.raises(PlanError) as refused:
        _install_in_sequence_parallel(meta("mixtral", attention_dropout=0.1))
    (said,) = [str(problem) for problem in refused.value.problems]
    assert said.startswith(
        "parallel.sequence_parallel: model.layers.0.mlp needs whole sequences, and dropout is active"
    )
    assert "dropout rates to 0, or sequence_parallel to false" in said
    _install_in_sequence_parallel(meta("mixtral", attention_dropout=0.0))
    _install_in_sequence_parallel(meta("llama", attention_dropout=0.1))


@pytest.mark.fast
@pytest.mark.parametrize(("model_type", "fields", "active"), [
    ("llama", {}, False),
    ("llama", {"attention_dropout": 0.1}, True),
    ("gpt_neox", {"classifier_dropout": 0.1}, False),  # of a head that a language model does not have
    ("gpt_neox", {"hidden_dropout": 0.1}, True),
    ("gpt2", {"summary_first_dropout": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False),
    ("gpt2", {}, True),
    ("mpt", {}, False),
    ("mpt", {"attn_config": {"attn_pdrop": 1}}, True),  # in a configuration of its own
])  # fmt: skip
def test_active_dropout_is_detected(model_type: str, fields: dict[str, Any], active: bool) -> None:
    assert has_active_dropout(meta(model_type, **fields)) == active


# Random numbers ------------------------------------------------------------------------------------------------------
