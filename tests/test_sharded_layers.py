"""Sharded layers against full ones, and vocabularies that are not divisible."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.harness import run_ranks
from tests.tensor_parallel_helpers import shard_model, single_tensor_group
from tools.parity.shrink import tiny
from trainer.sharding import Joiner, shard_of
from trainer.tasks import IGNORE_INDEX
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel import TensorMapper

WIDTH, HEADS, HEAD = 16, 4, 4


class Feedforward(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        if variant == "conv":
            self.up, self.down = Conv1D(32, WIDTH), Conv1D(WIDTH, 32)
        else:
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=variant != "no bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    """Gate and up in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(WIDTH, 64), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Joined(nn.Module):
    """A row layer over two sharded activations, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 24), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.first(x), self.second(x)], -1).sin())


class GatheredSplit(nn.Module):
    """A column layer whose output is gathered, and a row layer with a full input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


def attend(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Return attention of q, k, v, all (B, T, heads x size); `groups` query heads share a key/value head."""
    q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Four query heads, two key/value heads; a norm over each head, and one over all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_groups = 2
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.head_norm, self.wide_norm = nn.LayerNorm(HEAD), RMSNorm(16)
        self.o = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.head_norm(self.wide_norm(self.q(x)).unflatten(-1, (-1, HEAD))).flatten(2)
        return self.o(attend(q, self.k(x), self.v(x), self.num_key_value_groups))


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states * (hidden_states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Fused(nn.Module):
    """Queries | keys | values in one matrix."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv, self.variant = HEADS, 2, variant
        self.qkv = Conv1D(32, WIDTH) if variant == "conv" else nn.Linear(WIDTH, 32)
        self.o = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([HEAD * self.num_heads, HEAD * self.num_kv, HEAD * self.num_kv], -1)
        return self.o(attend(q, k, v, self.num_heads // self.num_kv))


class Experts(nn.Module):
    """Three experts in bare parameters (expert, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 16, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(3, WIDTH, 8))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,eod->bteo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("bteo,edo,bte->btd", F.silu(gate) * up, self.down_proj, weights)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


class Tables(nn.Module):
    """Embeddings of ids that are computed from the input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table, self.wide = nn.Embedding(count, WIDTH, padding_idx=count - 2), nn.Embedding(count, WIDTH)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach()[..., 0] * 1000).long() % self.count
        ids[0, :2] = self.count - 2
        return x + self.table(ids) + self.wide(ids)


class Toy(PreTrainedModel):
    """One layer with a full input and a full output (B, T, D)."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(PreTrainedConfig())
        self.layers = nn.ModuleList([layer])

    def get_input_embeddings(self) -> Any:
        return None

    def get_output_embeddings(self) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


_UP_DOWN = {"up": "colwise", "down": "rowwise"}
_FUSED = {"": "divide:num_heads,num_kv", "qkv": "packed_colwise:16/4,~8/4,~8/4", "o": "rowwise"}

LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "linear": (lambda: Feedforward("linear"), _UP_DOWN),
    "linear without a bias in the row": (lambda: Feedforward("no bias"), _UP_DOWN),
    "Conv1D": (lambda: Feedforward("conv"), _UP_DOWN),
    "packed": (Gated, {"gate_up": "packed_colwise", "down": "rowwise"}),
    "packed row": (Joined, {"first": "colwise", "second": "colwise", "down": "packed_rowwise:8,24"}),
    "gathered and split": (GatheredSplit, {"up": "colwise_gather_output", "down": "rowwise_split_input"}),
    "shared heads": (
        Attention,
        {
            "q": "colwise:4",
            "k": "kv_colwise:4",
            "v": "kv_colwise:4",
            "o": "rowwise",
            "wide_norm": "rms_norm",
            "head_norm": "replicated_with_grad_allreduce",
        },
    ),
    "fused, shared heads": (lambda: Fused("linear"), _FUSED),
    "fused, shared heads, Conv1D": (lambda: Fused("conv"), _FUSED),
    "experts": (
        Mixture,
        {
            "router": "replicate",
            "experts": "moe_tp_experts",
            "experts.gate_up_proj": "packed_colwise",
            "experts.down_proj": "rowwise",
        },
    ),
    "embeddings of 11": (lambda: Tables(11), {"table": "embedding_rowwise", "wide": "embedding_colwise"}),
    "embeddings of 9, a rank with padding only": (
        lambda: Tables(9),
        {"table": "embedding_rowwise", "wide": "embedding_colwise"},
    ),
}
"""A layer's constructor, and its rows, counted from the layer."""


def compare_layers(names: list[str]) -> list[str]:
    """Return the tensors that differ from those of the full layer. Collective: all ranks must call it."""
    wrong = []
    with single_tensor_group() as world:
        for name in names:
            make, padding_rows = LAYERS[name]
            torch.manual_seed(3)
            full = Toy(make()).double()
            with torch.no_grad():
                for parameter in full.parameters():
                    parameter.copy_(torch.randn_like(parameter) / 2)
            sharded = copy.deepcopy(full)
            shard_model(
                sharded, world, {f"layers.*.{key}".removesuffix("."): style for key, style in padding_rows.items()}
            )
            x = torch.randn(2, 6, WIDTH, dtype=torch.double)
            inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            outputs = [full(inputs[0]), sharded(inputs[1])]
            output_gradient = torch.randn_like(outputs[0])
            for output in outputs:
                output.backward(output_gradient)
            pairs = {"output": (outputs[0], outputs[1]), "input": (inputs[0].grad, inputs[1].grad)}
            expected = dict(full.named_parameters())
            for key, parameter in sharded.named_parameters():
                shard = shard_of(parameter)
                assert shard is not None
                pairs[key] = shard.extract(expected[shard.name].grad), parameter.grad
            wrong += [
                f"{name}: {key} on rank {world.topology.rank}"
                for key, (a, b) in pairs.items()
                if b is None or a.shape != b.shape or not torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            ]
    return wrong


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_layers_match_full_layers(ranks: int) -> None:
    assert run_ranks(compare_layers, ranks, list(LAYERS)) == [[]] * ranks


PADDED_VOCABULARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 259, "pad_token_id": 200, "tie_word_embeddings": False}),
    "llama tied": ("llama", {"vocab_size": 259, "pad_token_id": 200, "tie_word_embeddings": True}),
    "gpt2 tied": ("gpt2", {"vocab_size": 257}),
    "gptj, a bias in the head": ("gptj", {"vocab_size": 259}),
    "llama of 5 words": ("llama", {"vocab_size": 5, "pad_token_id": 4, "tie_word_embeddings": True}),
}
"""Models whose vocabulary is not divisible; the fourth of four ranks has only padding of the last one."""


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def _padded_model(name: str) -> PreTrainedModel:
    model_type, fields = PADDED_VOCABULARIES[name]
    config = _without_dropout(tiny(model_type, num_hidden_layers=2, **fields))
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def _padding(parameter: nn.Parameter) -> Tensor:
    """Return values and gradients (2, elements) of the padding of a shard."""
    shard = shard_of(parameter)
    assert shard is not None
    if shard.is_full:
        return parameter.new_empty(0)
    inside = torch.zeros(shard.local_shape(), dtype=torch.bool)
    for local_index, _ in shard.blocks():
        inside[local_index] = True
    return torch.stack([parameter.detach(), parameter.grad])[:, ~inside]  # type: ignore[list-item]


def _one_step(
    full: PreTrainedModel, sharded: PreTrainedModel, mapper: TensorMapper, generator: torch.Generator
) -> None:
    """Compare the loss and every gradient; the gradients stay on the parameters."""
    vocabulary = full.config.vocab_size
    ids, labels = (torch.randint(0, vocabulary, (2, 12), generator=generator) for _ in range(2))
    ids[0, :3], ids[1, :2] = vocabulary - 1, full.config.pad_token_id or 0
    labels[:, ::5] = IGNORE_INDEX
    loss = F.cross_entropy(full(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    sums = VocabularyCrossEntropy(shard=mapper.vocabulary_shard())(sharded(ids).logits, labels)
    torch.testing.assert_close(sums.loss_sum, loss.detach(), rtol=1e-6, atol=1e-6)
    loss.backward()
    sums.objective.backward()
    expected = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in sharded.named_parameters():
        shard = shard_of(parameter)
        assert shard is not None
        what = f"{full.config.model_type} of {vocabulary}: {name}"
        torch.testing.assert_close(
            parameter.grad,
            shard.extract(expected[shard.name]),
            rtol=1e-6,
            atol=floor,
            msg=lambda m, s=what: f"{s}: {m}",
        )
        assert not _padding(parameter).any(), f"{what} has a gradient in its padding"


def train_padded_vocabularies(names: list[str]) -> dict[str, int]:
    """Compare losses, gradients and joined weights over two steps of AdamW. Collective: all ranks must call it.

    Returns:
        The number of padded elements by model.
    """
    padded = {}
    with single_tensor_group() as world:
        for name in names:
            full = _padded_model(name)
            sharded = copy.deepcopy(full)
            mapper, generator = shard_model(sharded, world), torch.Generator().manual_seed(2)
            for _ in range(2):
                _one_step(full, sharded, mapper, generator)
                for model in (full, sharded):
                    _train(model)
            padded[name] = 0
            for parameter in sharded.parameters():
                parameter.grad = torch.zeros_like(parameter)
                assert not _padding(parameter).any()
                padded[name] += _padding(parameter).numel() // 2
            joiner = Joiner(world.groups.of)
            joined = dict(item for n, p in sharded.named_parameters() for item in joiner.add(n, p.data, shard_of(p)))
            assert joined.keys() == dict(full.named_parameters()).keys()
            for key, parameter in full.named_parameters():
                assert joined[key].shape == parameter.shape
                torch.testing.assert_close(joined[key], parameter.data, rtol=0, atol=1e-6)
    return padded


def _train(model: nn.Module) -> None:
    """Take the first step of AdamW, with every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("ranks", "padding_rows"), [(2, (2, 1, 1, 1, 1)), (4, (2, 1, 3, 1, 2))])
def test_padded_vocabularies_match_full_ones(ranks: int, padding_rows: tuple[int, ...]) -> None:
    """`padding_rows` of padding in each model's embedding and head on the last rank; GPT-J's head is counted below."""
    padded = run_ranks(train_padded_vocabularies, ranks, list(PADDED_VOCABULARIES))[-1]
    head = 64 + 1  # GPT-J has an untied head with a bias
    expected = dict(zip(PADDED_VOCABULARIES, (64 * n for n in padding_rows), strict=True))
    expected["gptj, a bias in the head"] += head
    assert padded == expected
