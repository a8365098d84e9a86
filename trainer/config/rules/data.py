"""Rules about data, evaluation, and where a run writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.config.paths import has_dataset_splits, has_only_token_files, is_local, matching_files, path_problems
from trainer.config.rules.registry import Draft, rule
from trainer.config.schema import DEFAULT_CACHE
from trainer.errors import Problem
from trainer.run_layout import layout_problems


@rule("data.packing", "data.drop_last")
def drop_last_requires_concatenation(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    if draft.data.drop_last and draft.data.packing == "none":
        yield Problem("data.drop_last", "true, and under data.packing 'none' no sample is cut off a source",
                      "Set it to false, or packing to 'concatenate'")  # fmt: skip


@rule("data")
def data_paths_readable(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(draft.data, split)):
            if source.path is not None:
                yield from path_problems(f"data.{split}.{index}.path", source.path)


@rule("data")
def validation_excludes_training_files(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    trained: set[Path] = set()
    for path in (source.path for source in draft.data.train):
        if is_local(path):
            trained.update(f.resolve() for f in matching_files(path))
    for index, source in enumerate(draft.data.validation):
        held_out = matching_files(source.path) if source.path is not None and is_local(source.path) else []
        shared = [f for f in held_out if f.resolve() in trained and not has_dataset_splits(f)]
        if shared:
            yield Problem(
                f"data.validation.{index}.path",
                f"'{shared[0]}' is also trained on",
                "Validate on files that data.train does not match",
            )


@rule("data.validation")
def validation_source_is_path_or_fraction(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    first = None
    for index, source in enumerate(draft.data.validation):
        key = f"data.validation.{index}"
        if (source.path is None) == (source.fraction is None):
            count = "neither" if source.path is None else "both"
            yield Problem(key, f"either 'path' or 'fraction' is required (got {count})", "Give one of the two")
        elif source.fraction is not None and first is not None:
            yield Problem(
                f"{key}.fraction", f"data.validation.{first} holds out a fraction already", "Take one of them"
            )
        elif source.fraction is not None:
            first = index


@rule("data.validation")
def validation_sources_unweighted(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    for index, source in enumerate(draft.data.validation):
        if source.weight != 1.0:
            yield Problem(
                f"data.validation.{index}.weight", f"{source.weight}: an evaluation reads everything once", "Remove it"
            )


@rule("data", "model")
def tokenizer_available(draft: Draft) -> Iterator[Problem]:
    assert draft.data is not None
    assert draft.model is not None
    tokenizer = draft.data.tokenizer
    texts = [path for path in draft.data.paths if not has_only_token_files(path)]
    if (
        not tokenizer
        and draft.model.path is None
        and texts
        and all(has_only_token_files(s.path) for s in draft.data.train)
    ):
        yield Problem(
            "data.tokenizer",
            f"required to read '{texts[0]}': data.train holds tokens only, on which no tokenizer can be trained",
            "Give the folder of the tokenizer that made them",
        )
    if tokenizer and tokenizer.startswith((".", "/", "~")) and not Path(tokenizer).expanduser().is_dir():
        yield Problem(
            "data.tokenizer", f"'{tokenizer}' is not a folder", "Give a folder with a tokenizer, or a hub name"
        )


@rule("evaluation", "data.validation")
def evaluation_requires_validation_data(draft: Draft) -> Iterator[Problem]:
    assert draft.evaluation is not None
    assert draft.data is not None
    if draft.evaluation.every_steps and not draft.data.validation:
        yield Problem("evaluation.every_steps", "there is nothing to evaluate on", "Give data.validation")


@rule("run.output_dir", "data.cache_dir")
def output_directories_writable(draft: Draft) -> Iterator[Problem]:
    for key, folder in (
        ("run.output_dir", draft.run.output_dir if draft.run else None),
        ("data.cache_dir", (draft.data.cache_dir or DEFAULT_CACHE) if draft.data else None),
    ):
        if folder is None:
            continue
        path = Path(os.path.abspath(os.path.expanduser(folder)))
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir():
            yield Problem(key, f"'{existing}' is a file", "Give a folder")
            continue
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Problem(key, f"'{existing}' cannot be written to: {error.strerror}", "Give another folder")


@rule("run.output_dir")
def run_directory_supports_partial_writes(draft: Draft) -> Iterator[Problem]:
    assert draft.run is not None
    yield from layout_problems(Path(draft.run.output_dir).expanduser())
