"""Pretrained weights: checks of weight files, and the generator that reads them one tensor after the other.

The model is on the meta device. Of each weight a rank reads only its shard, straight from the position in the file.
Names and shapes in the files may differ from the model's (experts one by one, older names): transformers' own rules
convert them.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from trainer.checkpoint_format import is_checkpoint, read_manifest
from trainer.config.model_config import load_model_config
from trainer.errors import ConfigError, Problem, first_line
from trainer.model.initialize import Parameters, initialize_buffers
from trainer.model.unexpected_keys import UnmatchedKeys, classify_unmatched, list_keys, refuse_quantized
from trainer.model.weight_files import WeightFiles, open_weight_files
from trainer.model.weight_reader import WeightReader
from trainer.model.weight_targets import Target, find_targets, refuse_differing_tied_weights
from trainer.sharding import local_and_remote_parameters

log = logging.getLogger(__name__)


def check_weight_headers(model: PreTrainedModel, path: str, *, allow_unexpected_keys: bool = False) -> None:
    """Check the headers of the weights in a local folder, without reading the weights.

    Weights of a name on the hub are checked when they are read, because they may have to be downloaded.

    Args:
        model: on the meta device.
        path: of the folder.
        allow_unexpected_keys: skip keys of no class of the family.

    Raises:
        ConfigError: if the weights are quantized, or have unexpected keys.
    """
    if Path(path).expanduser().is_dir():
        with _errors_as_problems(path):
            _find_checked_targets(model, path, open_weight_files(path), allow_unexpected_keys=allow_unexpected_keys)


def pretrained_weights(
    model: PreTrainedModel, path: str, *, allow_unexpected_keys: bool = False
) -> Iterator[Parameters]:
    """Read the weights at `path` into a model on the meta device; yield parameters with their final values.

    A parameter with a shard record gets the memory and the values of that shard only. Peak memory in addition to this
    rank's shards is the largest single tensor. The consumer may replace the data of the yielded parameters.

    Args:
        model: whose buffers are set as well.
        path: a folder, a checkpoint, or a name on the hub.
        allow_unexpected_keys: skip keys of no class of the family, instead of refusing them.

    Raises:
        ConfigError: if the files cannot be read, do not fit the model, or this rank's part holds NaN or infinity.
    """
    log.info("loading weights from %s", path)
    with _errors_as_problems(path):
        files = open_weight_files(path)
        initialize_buffers(model)
        targets, unmatched = _find_checked_targets(model, path, files, allow_unexpected_keys=allow_unexpected_keys)
        refuse_differing_tied_weights(model, path, targets, files)
        reader = WeightReader(model, files)
        for target in targets.values():
            yield from reader.read(target)
    if reader.non_finite:
        raise ConfigError(
            Problem(
                "model.path",
                f"weights in '{path}' are NaN or infinite (got {list_keys(reader.non_finite)})",
                "Use an undamaged copy of the model, or an earlier checkpoint",
            )
        )
    yield from reader.initialize_computed()
    for problem, names in (("mismatched", reader.mismatched), ("missing", reader.missing())):
        if names:
            raise ConfigError(
                Problem(
                    "model.path",
                    f"weights in '{path}' do not fit the model: {problem} {list_keys(names, 5)}",
                    "Check that config.json and the weights belong together",
                )
            )
    _log_skipped(model, path, unmatched)
    _load_generation_config(model, path)


def read_weights(model: PreTrainedModel, path: str, *, allow_unexpected_keys: bool = False) -> None:
    """Read all weights at `path` into a model on the meta device. See `pretrained_weights`."""
    deque(pretrained_weights(model, path, allow_unexpected_keys=allow_unexpected_keys), maxlen=0)


def _find_checked_targets(
    model: PreTrainedModel, path: str, files: WeightFiles, *, allow_unexpected_keys: bool
) -> tuple[dict[str, Target], UnmatchedKeys]:
    """Return the model's tensors with their sources, and the keys that are skipped.

    Raises:
        ConfigError: if the weights are quantized, or have unexpected keys.
    """
    targets, keys = find_targets(model, files)
    headers = {key: files.header(key) for key in files.names()}
    tensors = model.state_dict() | dict(local_and_remote_parameters(model))
    is_floating = {key: tensors[t.name].is_floating_point() for t in targets.values() for key, _ in t.sources}
    refuse_quantized(path, is_floating, headers)
    unmatched = UnmatchedKeys([], [])
    if keys:
        unmatched = classify_unmatched(model, _stored_config(path), keys, headers)
    if unmatched.unexpected and not allow_unexpected_keys:
        count, first = len(unmatched.unexpected), list_keys(unmatched.unexpected)
        raise ConfigError(
            Problem(
                "model.path",
                f"the weights in '{path}' have unexpected keys, which no class of '{model.config.model_type}' has with "
                f"this configuration (got {count}: {first})",
                "Check that config.json and the weights belong together, or set model.allow_unexpected_keys to true "
                "to skip them",
            )
        )
    return targets, unmatched


def _stored_config(path: str) -> PreTrainedConfig | None:
    """Return the configuration next to the weights, which may describe a larger model; None without one."""
    try:
        return load_model_config(path)
    except ConfigError:
        return None


@contextlib.contextmanager
def _errors_as_problems(path: str) -> Iterator[None]:
    """Turn errors of the hub, the network, safetensors and conversions into a problem of `model.path`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause = first_line(error)
        raise ConfigError(
            Problem("model.path", f"'{path}' cannot be read: {cause}", "Check the folder, the name, the network")
        ) from None


def _log_skipped(model: PreTrainedModel, path: str, unmatched: UnmatchedKeys) -> None:
    keys = [*unmatched.unexpected, *unmatched.skipped]
    if not keys:
        return
    unexpected = f" ({len(unmatched.unexpected)} unexpected)" if unmatched.unexpected else ""
    model_class, listed = type(model).__name__, list_keys(keys)
    log.info("skipped %d keys%s in %s that %s does not have: %s", len(keys), unexpected, path, model_class, listed)


def _load_generation_config(model: PreTrainedModel, path: str) -> None:
    folder = Path(path).expanduser()
    if model.can_generate() and is_checkpoint(folder):
        model.generation_config = GenerationConfig.from_dict(dict(read_manifest(folder).model["generation"] or {}))
    elif model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:
            log.info("%s has no generation_config.json; generation uses the defaults of the configuration", path)
