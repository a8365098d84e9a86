"""Rules about where a run writes, and about secrets that a stored configuration lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.rules.registry import rule, rule_reading
from trainer.config.schema import DEFAULT_CACHE, CheckpointSection, DataSection, ModelSection, RunSection
from trainer.errors import Problem
from trainer.files import unwritable_reason
from trainer.run_layout import layout_problems
from trainer.sanitize import is_redacted


def _unwritable(key: str, folder: str) -> Iterator[Problem]:
    if reason := unwritable_reason(Path(folder).expanduser()):
        yield Problem(key, reason, "Choose another folder, or change its permissions")


@rule_reading("run.output_dir")
def output_directory_writable(run: RunSection) -> Iterator[Problem]:
    yield from _unwritable("run.output_dir", run.output_dir)


@rule_reading("data.cache_dir")
def cache_directory_writable(data: DataSection) -> Iterator[Problem]:
    yield from _unwritable("data.cache_dir", data.cache_dir or DEFAULT_CACHE)


@rule_reading("run.output_dir")
def run_directory_layout_valid(run: RunSection) -> Iterator[Problem]:
    yield from layout_problems(Path(run.output_dir).expanduser())


@rule
def secrets_present(checkpoint: CheckpointSection, data: DataSection, model: ModelSection) -> Iterator[Problem]:
    urls = {
        "checkpoint.upload": checkpoint.upload,
        "checkpoint.resume": checkpoint.resume,
        "model.path": model.path,
        **{f"data.train.{index}.path": source.path for index, source in enumerate(data.train)},
        **{f"data.validation.{index}.path": source.path for index, source in enumerate(data.validation)},
    }
    for key, url in urls.items():
        if url is not None and is_redacted(url):
            yield Problem(
                key,
                f"its secret was removed when this configuration was stored (got {url!r})",
                f"Set the whole URL, for example with --set {key}=...",
            )
