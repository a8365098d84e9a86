"""Special tokens around documents and prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configs import with_values
from tests.data_helpers import prepared
from tests.small_tokenizers import KINDS, framed_by, make, save
from trainer.config.earlier_versions import StoredRun, stored_run
from trainer.config.load import check_config
from trainer.data import DocumentFrame, document_frame, resolve_frame, resolve_prompt_prefix
from trainer.data.sources import Source
from trainer.data.tokenizer import tokenizer_hash
from trainer.errors import ConfigError
from trainer.tasks.samples import ConcatenatedSamples

pytestmark = pytest.mark.fast


FRAMED_TEXTS = ["seven wizards", "brew potions", "of quartz and jade while the quick fox jumps"]


def framed_config(tiny: dict[str, Any], tokenizer_name: str, folder: Path, **values: object) -> dict[str, Any]:
    """Configure three training documents and a validation document, with one of the small tokenizers."""
    (folder / "framed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in FRAMED_TEXTS))
    (folder / "held.jsonl").write_text(json.dumps({"text": FRAMED_TEXTS[1]}) + "\n")
    paths = {
        name: [{"path": str(folder / f"{file}.jsonl")}] for name, file in (("train", "framed"), ("validation", "held"))
    }
    return with_values(
        tiny,
        data__tokenizer=str(save(tokenizer_name, folder)),
        data__train=paths["train"],
        data__sequence_length=8,
        data__validation=paths["validation"],
        data__cache_dir=str(folder / "cache"),
        **values,
    )


@pytest.mark.parametrize("mode", [None, "tokenizer", "end", "none"])
@pytest.mark.parametrize("tokenizer_name", KINDS)
def test_special_tokens_frame_documents(
    tokenizer_name: str, mode: str | None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = framed_config(tiny, tokenizer_name, tmp_path, data__special_tokens=mode)
    if mode == "end" and KINDS[tokenizer_name].end is None:
        with pytest.raises(ConfigError, match="needs an end-of-text token"):
            prepared(config)
        return
    data, tokenizer = prepared(config), make(tokenizer_name)
    assert data.frame is not None
    tokens_of_mode = {"end": ["TEXT", KINDS[tokenizer_name].end], "none": ["TEXT"]}
    tokens = tokens_of_mode.get(mode or "tokenizer", framed_by(KINDS[tokenizer_name]))

    def expected(text: str) -> list[int]:
        inside = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        split = tokens.index("TEXT")
        return tokenizer.convert_tokens_to_ids([*tokens[:split], *inside, *tokens[split + 1 :]])

    assert [data.train[0].document(n).tolist() for n in range(3)] == [expected(text) for text in FRAMED_TEXTS]
    assert data.validation[0].document(0).tolist() == expected(FRAMED_TEXTS[1])
    assert [*data.frame.prefix_tokens, "TEXT", *data.frame.suffix_tokens] == tokens
    assert document_frame(check_config(config, world_size=1, device="cpu")) == data.frame
    if mode in (None, "tokenizer"):
        ids = tokenizer(FRAMED_TEXTS[0])["input_ids"]
        end = tokenizer.eos_token_id
        assert expected(FRAMED_TEXTS[0]) == ids + ([end] if end is not None and end not in ids else [])


def test_long_document_has_special_tokens_once(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of chunks and samples; an empty document has none."""
    monkeypatch.setattr("trainer.data.documents._CHUNK_SIZE", 30)
    (tmp_path / "long.txt").write_text("\n\n" + "seven wizards\n" * 40)
    (tmp_path / "zero.txt").write_text("")
    config = framed_config(tiny, "bert", tmp_path)
    data = prepared(with_values(config, data__train=[{"path": str(tmp_path / "*.txt")}]))
    seven, wizards = make("bert").convert_tokens_to_ids(["seven", "wizards"])
    assert data.frame is not None
    before, after = data.frame.prefix[0], data.frame.suffix[0]
    assert data.train[0].document(0).tolist() == [before, *([seven, wizards] * 40), after]
    assert len(data.train[0]) == 1
    samples = ConcatenatedSamples(data.train[0], 8)
    assert sum(samples.ids(n).tolist().count(before) for n in range(len(samples))) == 1


def test_cache_names_match_earlier_versions(tiny: dict[str, Any], tmp_path: Path) -> None:
    """`"end"` and `"none"` keep the names of `append_end_of_text`; other frames have different names."""
    names = {}
    for mode in ("end", "none", "tokenizer"):
        config = framed_config(tiny, "llama", tmp_path, data__special_tokens=mode)
        names[mode] = prepared(config).train[0].bin_path.parent.name
    tokenizer = make("llama")
    content = Source(str(tmp_path / "framed.jsonl"), "train", "text").content_hash()
    for mode, end in (("end", tokenizer.eos_token_id), ("none", None)):
        settings = [1, tokenizer_hash(tokenizer), "text", end, "uint16"]
        digest = hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()
        assert names[mode] == f"tokens-{digest[:32]}"
    assert names["tokenizer"] not in (names["end"], names["none"])


def test_trained_tokenizer_adds_only_end_of_text(tiny: dict[str, Any]) -> None:
    """Its token files equal those of `"end"`, and its frame is known before it is trained."""
    data, end = prepared(tiny), prepared(tiny, data__special_tokens="end")
    assert data.tokenizer is not None
    assert [tokens.bin_path for tokens in data.train] == [tokens.bin_path for tokens in end.train]
    assert data.frame == DocumentFrame((), (data.tokenizer.eos_token_id,), (), ("<|endoftext|>",))
    assert document_frame(check_config(tiny, world_size=1, device="cpu")) == data.frame
    without = prepared(tiny, data__special_tokens="none").frame
    assert without is not None
    assert not without.suffix


def test_text_dependent_special_tokens_are_refused() -> None:
    class TextDependentTokenizer:
        eos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [*([len(text)] if add_special_tokens else []), 7, 8]}

    with pytest.raises(ConfigError, match="does not add the same special tokens to every text"):
        resolve_frame(TextDependentTokenizer(), "tokenizer")  # type: ignore[arg-type]


def test_prompt_prefix_follows_recorded_frame(tmp_path: Path) -> None:
    """No prefix after training on token files, or without a record if the special tokens depend on the text."""
    from launch.generate import find_tokenizer

    class TextDependentTokenizer:
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [*([len(text)] if add_special_tokens else []), 7, 8]}

    tokenizer = find_tokenizer(str(save("llama", tmp_path)))
    begin = tuple(tokenizer.convert_tokens_to_ids(["<s>"]))
    assert resolve_prompt_prefix(tokenizer, None) == begin, "a folder of unknown origin"
    assert resolve_prompt_prefix(TextDependentTokenizer(), None) == ()
    for frame, prefix in ((DocumentFrame((5, 6), (2,)).as_json(), (5, 6)), (None, ())):
        stored = {"run": {}, "data": {"special_tokens": "tokenizer"}, "tessera": {"document_frame": frame}}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert resolve_prompt_prefix(TextDependentTokenizer(), stored_run(tmp_path)) == prefix
    for mode, prefix in (("tokenizer", begin), ("end", ()), ("none", ())):
        manifest_alone = StoredRun(tmp_path, {"run": {}, "data": {"special_tokens": mode}}, {})
        assert resolve_prompt_prefix(tokenizer, manifest_alone) == prefix, "a checkpoint's manifest records no frame"


@pytest.mark.parametrize(("mode", "prefix"), [("tokenizer", ["<s>"]), ("end", []), ("none", []), (None, [])])
def test_prompts_get_document_prefix(mode: str | None, prefix: list[str], tmp_path: Path) -> None:
    """Without the suffix. None stands for a run of an earlier version, which added no prefix."""
    from launch.generate import find_tokenizer
    from trainer.model import generate_texts

    data = {"append_end_of_text": True} if mode is None else {"special_tokens": mode}
    tokenizer = find_tokenizer(str(save("llama", tmp_path)))
    about = {} if mode is None else {"document_frame": resolve_frame(tokenizer, mode).as_json()}  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"run": {}, "data": data, "tessera": about}))
    inputs = []

    class Model:
        device = "cpu"

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
            inputs.append(input_ids[0].tolist())
            assert attention_mask.tolist() == [[1] * input_ids.shape[1]]
            return torch.cat([input_ids, torch.tensor([[tokenizer.eos_token_id]])], 1)

    ids = resolve_prompt_prefix(tokenizer, stored_run(tmp_path))
    options: dict[str, Any] = {"tokens": 1, "temperature": 0.0}
    texts = list(generate_texts(Model(), tokenizer, ["brew potions"], prefix=ids, **options))
    inside = tokenizer("brew potions", add_special_tokens=False)["input_ids"]
    assert inputs == [[*tokenizer.convert_tokens_to_ids(prefix), *inside]]
    assert texts == [tokenizer.decode(inside)]
