"""Export of the trained model as a Hugging Face folder, block by block."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from trainer.checkpoint_format import FileRecord, write_safetensors
from trainer.compat.transformers.conversion import to_file_tensors, use_published_names
from trainer.compat.transformers.models import names_not_saved
from trainer.config.tasks import DEFAULT_TASK, TASK_FAMILIES
from trainer.errors import ConfigError, Problem
from trainer.files import convert_bare_exceptions_to_os_errors, hash_file, remove, replace_folder, sync_tree
from trainer.sharding import local_and_remote_parameters
from trainer.tasks import TASKS
from trainer.tensor_parallel import choose_experts_implementation
from trainer.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHARD_BYTES = 2 * 2**30
"""Maximum size of a weight file, which is in host memory at once."""


def _stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the stored name of each parameter by its first name: of tied ones, the name that the family keeps."""
    groups: dict[int, list[str]] = {}
    for name, parameter in local_and_remote_parameters(model):
        groups.setdefault(id(parameter), []).append(name)
    aliases = set(model.all_tied_weights_keys)
    return {
        names[0]: next((name for name in names if name not in aliases), sorted(names)[-1]) for names in groups.values()
    }


class _ShardWriter:
    """Writes tensors into safetensors files of a bounded size, with the index that transformers expects."""

    def __init__(self, folder: Path, largest: int) -> None:
        self._folder, self._largest = folder, largest
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._files: list[tuple[FileRecord, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self._largest:
            self._flush()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += size
        self._total += size

    def _name(self, number: int, of: str) -> Path:
        return self._folder / f"model-{number:05}-of-{of}.safetensors"

    def _flush(self) -> None:
        aligned = sorted(self._held.items(), key=lambda item: (-item[1].element_size(), item[0]))
        written, _ = write_safetensors(self._name(len(self._files) + 1, "?"), aligned)
        self._files.append((written, list(self._held)))
        self._held, self._bytes = {}, 0

    def close(self) -> dict[str, str]:
        """Finish; return the hash of each written file, by file name."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._name(1, "?").rename(self._folder / SAFE_WEIGHTS_NAME)
            return {SAFE_WEIGHTS_NAME: self._files[0][0].hash}
        placed: dict[str, str] = {}
        hashes: dict[str, str] = {}
        for number, (written, names) in enumerate(self._files, start=1):
            final = self._name(number, f"{count:05}")
            self._name(number, "?").rename(final)
            placed |= dict.fromkeys(names, final.name)
            hashes[final.name] = written.hash
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        return hashes


def _by_block(weights: Iterable[tuple[str, Tensor]], model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the weights, one block at a time: transformers splits and joins tensors of one block only."""
    stacks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    block, held = "", dict[str, Tensor]()
    for name, tensor in weights:
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        block_name = name if stack is None else stack + name.removeprefix(stack).partition(".")[0]
        if held and block_name != block:
            yield held
            held = {}
        block = block_name
        held[name] = tensor.detach().to("cpu", copy=True)
    if held:
        yield held


def _loadable_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration by which the auto class finds the model's class.

    For the language model of a multimodal family (Emu3, Mllama) it is the family's, which contains the model's own.
    """
    config = model.config
    classes = [entry for families in TASK_FAMILIES.values() for entry in families.class_names.items()]
    if config.model_type in dict(classes):
        return config
    for model_type, name in classes:
        config_class: Any = CONFIG_MAPPING[model_type]
        if name == type(model).__name__ and config_class.sub_configs.get("text_config") is type(config):
            multimodal: PreTrainedConfig = config_class(text_config=config.to_dict())
            return multimodal
    return config


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a model without its weights, as JSON: Hugging Face's configurations and class."""
    generation = json.loads(model.generation_config.to_json_string()) if model.can_generate() else None
    config = json.loads(_loadable_config(model).to_json_string(use_diff=False))
    return {"config": config, "class": type(model).__name__, "generation": generation}


def write_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    writes: bool = True,
    dtype: torch.dtype | None = None,
    largest: int = SHARD_BYTES,
    card: str | None = None,
) -> tuple[FileRecord, ...]:
    """Write a model folder atomically: configuration, safetensors, and the tokenizer if there is one.

    Names and shapes in the files are those that the family publishes, which may differ from the model's (experts one by
    one). Host memory: one block, and one file of at most `largest` bytes. All files are synced, read again and compared
    with what was written before the folder gets its name.

    Args:
        model: gives structure and configuration; its parameters are not read.
        weights: every parameter and persistent buffer with its Hugging Face name, in full shape and the model's order.
            Exhausting it may be collective.
        folder: to write, replacing an earlier one.
        tokenizer: to save with the model.
        writes: whether this rank writes; other ranks only exhaust `weights`.
        dtype: of the floating-point weights in the files; unchanged by default.
        largest: maximum bytes of a weight file.
        card: text of the model card, README.md.

    Returns:
        Name, size and hash of each file, on the rank that writes.

    Raises:
        ConfigError: on the rank that writes, if the folder cannot be written. An earlier folder is then unchanged.
    """
    weights = iter(weights)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if writes:
            remove(partial)
            partial.mkdir(parents=True)
            hashes = _write_weights(model, weights, _ShardWriter(partial, largest), dtype)
            _write_text(model, partial, hashes.dtype, tokenizer=tokenizer, card=card)
            files = _verified(partial, hashes.by_file)
            replace_folder(partial, folder)
            return files
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(partial)
        for _ in weights:  # which may be collective
            pass
        reason = f"the model cannot be written: {error.strerror or error}"
        raise ConfigError(
            Problem(
                str(folder), reason, "Free some space and run the same command, which resumes from the last checkpoint"
            )
        ) from None
    for _ in weights:
        pass
    return ()


class _WrittenWeights(NamedTuple):
    dtype: torch.dtype
    by_file: dict[str, str]
    """Hash of each file."""


def _write_weights(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], writer: _ShardWriter, dtype: torch.dtype | None
) -> _WrittenWeights:
    """Write the safetensors files; see `write_model`."""
    stored, unwanted = _stored_names(model), names_not_saved(model)
    use_published_names(model)
    written = dtype or model.dtype
    for block in _by_block(weights, model):
        if dtype is None:
            written = next((tensor.dtype for name, tensor in block.items() if name in stored), written)
        else:
            block = {name: t.to(dtype) if t.is_floating_point() else t for name, t in block.items()}
        named = {stored.get(name, name): tensor for name, tensor in block.items() if name not in unwanted}
        for name, tensor in to_file_tensors(model, named).items():
            writer.add(name, tensor)
    return _WrittenWeights(written, writer.close())


def _write_text(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None,
) -> None:
    """Write everything that is not weights: configuration, tokenizer, model card."""
    transformers_logging.disable_progress_bar()
    config = copy.deepcopy(_loadable_config(model))
    config.use_cache, config.dtype, config.architectures = True, dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        with convert_bare_exceptions_to_os_errors():
            tokenizer.save_pretrained(str(folder))
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _verified(folder: Path, expected: Mapping[str, str]) -> tuple[FileRecord, ...]:
    """Sync the files of a folder and read them again.

    Raises:
        OSError: a file does not have the hash of what was written into it.
    """
    start = time.perf_counter()
    sync_tree(folder)
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files.append(FileRecord(name, path.stat().st_size, hash_file(path)))
        if expected.get(name, files[-1].hash) != files[-1].hash:
            raise OSError(f"{name} differs from what was written when read back")
    size, seconds = format_bytes(sum(file.bytes for file in files)), time.perf_counter() - start
    log.info("synced and verified %d files of the model (%s) in %.2f s", len(files), size, seconds)
    return tuple(files)


def load_exported(folder: Path, dtype: torch.dtype | None = None, task: str = DEFAULT_TASK) -> PreTrainedModel:
    """Load a model from a folder that `write_model` has written, ready to generate.

    Args:
        folder: of the model.
        dtype: to compute in; default: that of the weights in the files.
        task: `model.task`.
    """
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = TASKS[task].auto_class.from_pretrained(
        str(folder), dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
    )
    choose_experts_implementation(model, model.dtype)
    model.eval()
    return model
