"""Rules about data and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.paths import has_dataset_splits, has_only_token_files, is_local, matching_files, path_problems
from trainer.config.rules.registry import rule, rule_reading
from trainer.config.schema import DataSection, EvaluationSection, ModelSection
from trainer.errors import Problem


@rule_reading("data.packing", "data.drop_last")
def drop_last_requires_concatenation(data: DataSection) -> Iterator[Problem]:
    if data.drop_last and data.packing == "none":
        yield Problem(
            "data.drop_last",
            "true has no effect with data.packing 'none', where each document is a sample",
            "Set it to false, or packing to 'concatenate'",
        )


@rule
def data_paths_readable(data: DataSection) -> Iterator[Problem]:
    training = {f"data.train.{index}.path": source.path for index, source in enumerate(data.train)}
    validation = {f"data.validation.{index}.path": source.path for index, source in enumerate(data.validation)}
    for key, path in {**training, **validation}.items():
        if path is not None:
            yield from path_problems(key, path)


@rule
def validation_excludes_training_files(data: DataSection) -> Iterator[Problem]:
    training_files: set[Path] = set()
    for path in (source.path for source in data.train):
        if is_local(path):
            training_files.update(file.resolve() for file in matching_files(path))
    for index, source in enumerate(data.validation):
        files = matching_files(source.path) if source.path is not None and is_local(source.path) else []
        shared = [file for file in files if file.resolve() in training_files and not has_dataset_splits(file)]
        if shared:
            yield Problem(
                f"data.validation.{index}.path",
                f"'{shared[0]}' is also trained on",
                "Validate on files that data.train does not match",
            )


@rule_reading("data.validation")
def validation_source_is_path_or_fraction(data: DataSection) -> Iterator[Problem]:
    with_fraction = None
    for index, source in enumerate(data.validation):
        key = f"data.validation.{index}"
        if (source.path is None) == (source.fraction is None):
            count = "neither" if source.path is None else "both"
            yield Problem(key, f"either 'path' or 'fraction' is required (got {count})", "Set one of them")
        elif source.fraction is not None and with_fraction is not None:
            reason = f"data.validation.{with_fraction} already holds out a fraction"
            yield Problem(f"{key}.fraction", reason, "Remove one of them")
        elif source.fraction is not None:
            with_fraction = index


@rule_reading("data.validation")
def validation_sources_unweighted(data: DataSection) -> Iterator[Problem]:
    for index, source in enumerate(data.validation):
        if source.weight != 1.0:
            reason = f"must be 1.0, because an evaluation reads every sample once (got {source.weight})"
            yield Problem(f"data.validation.{index}.weight", reason, "Remove it")


@rule
def tokenizer_available(data: DataSection, model: ModelSection) -> Iterator[Problem]:
    tokenizer = data.tokenizer
    text_paths = [path for path in data.paths if not has_only_token_files(path)]
    needs_training = not tokenizer and model.path is None
    if needs_training and text_paths and all(has_only_token_files(source.path) for source in data.train):
        yield Problem(
            "data.tokenizer",
            f"required to read '{text_paths[0]}', because data.train has no text to train a tokenizer on",
            "Set it to the folder of the tokenizer that made the token files",
        )
    if tokenizer and tokenizer.startswith((".", "/", "~")) and not Path(tokenizer).expanduser().is_dir():
        yield Problem(
            "data.tokenizer", f"'{tokenizer}' is not a folder", "Set it to a folder with a tokenizer, or a hub name"
        )


@rule_reading("evaluation", "data.validation")
def evaluation_requires_validation_data(evaluation: EvaluationSection, data: DataSection) -> Iterator[Problem]:
    if evaluation.every_steps and not data.validation:
        yield Problem("evaluation.every_steps", "there is no data to evaluate on", "Set data.validation")
