"""Small configurations that the tests start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LENGTH = 32
VOCABULARY = 320


def tiny_config(corpus: Path, cache: Path, output: Path) -> dict[str, Any]:
    return {
        "run": {"output_dir": str(output), "seed": 11},
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "data": {
            "train": [{"path": str(corpus / "train.jsonl")}],
            "validation": [{"path": str(corpus / "validation.jsonl")}],
            "sequence_length": LENGTH,
            "cache_dir": str(cache),
        },
        "training": {"max_steps": 4, "log_every_steps": 2},
        "checkpoint": {"every_steps": None},  # at the end only: a run of four steps would save each
        "deepspeed": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "eps": 1e-3}},
            "gradient_clipping": 0.5,
        },
    }


def with_values(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a copy of `config` with `a__b=c` set at a.b; None removes a key."""
    import copy

    result = copy.deepcopy(config)
    for path, value in values.items():
        *parents, last = path.split("__")
        node = result
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return result


def optimizer(name: str, **params: object) -> dict[str, Any]:
    """Return a value of `deepspeed.optimizer`."""
    return {"type": name, "params": params}
