"""`launch/generate.py`: which weights it reads, compared with transformers' own reading of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.commands import read_rows
from tests.configs import tiny_config, with_values
from tests.harness import CommandResult, run_command
from trainer.model import load_model

ROOT = Path(__file__).parent.parent
TOKENS = 12


def generate(*arguments: object) -> CommandResult:
    ending = ("--prompt", "the quick", "--tokens", str(TOKENS), "--temperature", "0")
    return run_command(str(ROOT / "launch" / "generate.py"), *map(str, arguments), *ending)


def text_of(*arguments: object) -> str:
    ended = generate(*arguments)
    assert ended.status == 0, ended.err
    return ended.out


@pytest.fixture(scope="module")
def run(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at a rate so high that the validation loss rises again."""
    folder = tmp_path_factory.mktemp("generate")
    config = with_values(
        tiny_config(corpus, shared_cache, folder / "run"),
        evaluation__every_steps=1,
        checkpoint__every_steps=1,
        checkpoint__keep_last=4,
        deepspeed__optimizer__params__lr=0.3,
    )
    (folder / "config.json").write_text(json.dumps(config))
    ended = run_command(str(ROOT / "launch" / "train.py"), "--config", str(folder / "config.json"))
    assert ended.status == 0, ended.err
    return folder / "run"


def expected(folder: Path) -> str:
    """What transformers alone writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the quick", add_special_tokens=False)["input_ids"]])
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    return str(tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)) + "\n"


def test_generate_from_named_checkpoints(run: Path, tmp_path: Path) -> None:
    texts = {}
    for step in (1, 2, 3, 4):
        folder = run / "checkpoints" / f"step-{step:08}"
        exported = run_command(str(ROOT / "tools" / "checkpoint.py"), "export", str(folder), str(tmp_path / str(step)))
        assert exported.status == 0, exported.err
        texts[step] = text_of("--run", run, "--checkpoint", f"step-{step}")
        assert texts[step] == expected(tmp_path / str(step))
    assert len(set(texts.values())) > 2, "the steps can be told apart"
    assert text_of("--run", run) == text_of("--run", run, "--checkpoint", "final") == texts[4]
    assert text_of("--run", run, "--checkpoint", "latest") == texts[4]
    assert text_of("--path", run / "final") == text_of("--path", run / "checkpoints" / "step-00000004") == texts[4]
    losses = {row["step"]: row["loss"] for row in read_rows(run) if row["split"] == "validation" and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != 4
    assert text_of("--run", run, "--checkpoint", "best") == texts[best] != texts[4]


def test_generate_from_unfinished_or_damaged_run(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    texts = {step: text_of("--run", run, "--checkpoint", f"step-{step}") for step in (3, 4)}
    assert text_of("--run", copy) == texts[4], "the newest checkpoint"
    file = copy / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    previous = generate("--run", copy)
    assert previous.out == texts[3]
    assert "step-00000004/rank-00000.safetensors: damaged" in previous.err
    assert "falling back to the previous checkpoint" in previous.err
    for checkpoint, status in (("step-00000003", 0), ("step-00000004", 4), ("final", 4), ("step-9", 4)):
        assert generate("--run", copy, "--checkpoint", checkpoint).status == status, checkpoint
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    nothing = generate("--run", copy)
    assert nothing.status == 4
    assert "no valid checkpoint" in nothing.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_from_hugging_face_folder(dtype: torch.dtype, run: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "model")
    no_tokenizer = generate("--path", tmp_path / "model")
    assert no_tokenizer.status == 2
    assert f"'{tmp_path}/model' contains no tokenizer" in no_tokenizer.err
    AutoTokenizer.from_pretrained(run / "final").save_pretrained(tmp_path / "model")
    assert text_of("--path", tmp_path / "model") == expected(tmp_path / "model")
    assert load_model(str(tmp_path / "model")).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "{run}/final"], "'{run}/final' has neither a final model nor checkpoints. Use --path {run}/final"),
        (["--run", "{run}/checkpoints/step-00000002"], "Use --run {run} --checkpoint step-00000002"),
        (["--run", "./nowhere"], "--run: 'nowhere' is not a folder"),
        (["--path", "{run}"], "--path: '{run}' is the directory of a run. Use --run {run}"),
        (["--path", "./nowhere"], "--path: './nowhere' does not exist"),
        (["--path", "{run}/logs"], "--path: '{run}/logs' holds no config.json"),
        (["--run", "{run}", "--checkpoint", "last"], "expected latest, best, final or step-N, got 'last'"),
        (["--path", "{run}/final", "--checkpoint", "best"], "--checkpoint requires --run"),
        (["--run", "{run}", "--path", "{run}/final"], "not allowed with argument"),
        ([], "one of the arguments --run --path is required"),
        (["--run", "{run}", "--tokens", "0"], "--tokens must be at least 1"),
        (["--run", "{run}", "--temperature", "-1"], "--temperature a finite number of at least 0"),
    ],
)
def test_mistakes(arguments: list[str], words: str, run: Path) -> None:
    given = [argument.format(run=run) for argument in arguments]
    ended = run_command(str(ROOT / "launch" / "generate.py"), "--prompt", "x", *given)
    assert ended.status == 2
    assert words.format(run=run) in ended.err
    assert "Traceback" not in ended.err
