"""A model directory without a tokenizer is accepted for token files and refused for text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.configs import VOCABULARY, with_values
from tests.harness import run_command
from tools.parity.shrink import tiny as tiny_family
from trainer.data.indexed import IndexedWriter
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import ConfigError

ROOT = Path(__file__).parent.parent
TOKENIZER_FILE_PREFIXES = ("token", "vocab", "merges", "special")


def tokenizer_files(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(TOKENIZER_FILE_PREFIXES)]


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.matrix)])
def test_run_without_tokenizer_trains_and_exports(model_type: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """From a directory without vocabulary files transformers builds an empty tokenizer for gpt2."""
    model = AutoModelForCausalLM.from_config(tiny_family(model_type, vocab_size=VOCABULARY))
    model.save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        for _ in range(60):
            writer.add([draw.randrange(VOCABULARY) for _ in range(40)])
    config = with_values(
        tiny,
        model={"path": str(tmp_path / "model")},
        data__train=[{"path": str(tmp_path / "tokens.bin")}],
        data__validation=[],
        training__max_steps=2,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = run_command(str(ROOT / "launch" / "train.py"), "--config", str(tmp_path / "config.json"))
    assert ended.status == 0, ended.err
    assert "the trained model will be written without a tokenizer" in ended.out
    final, exported = tmp_path / "run" / "final", tmp_path / "exported"
    ended = run_command(str(ROOT / "tools" / "checkpoint.py"), "export", str(tmp_path / "run"), str(exported))
    assert ended.status == 0, ended.err
    for folder in (final, exported):
        assert (folder / "model.safetensors").is_file()
        assert not tokenizer_files(folder)
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "gemma3_text", "mamba"])
def test_folder_without_tokenizer_is_refused(model_type: str, tmp_path: Path) -> None:
    tiny_family(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: no tokenizer can be loaded from .*set data.tokenizer"):
        load_tokenizer(str(tmp_path), "model.path")
