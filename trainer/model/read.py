"""Reads pretrained weights, one after the other, and of each no more than this rank holds.

The model is on the meta device. Files are mapped, not loaded; a cut weight's parts are copied straight from their
places in the file. Names and shapes in the file may differ from the model's (experts one by one, older names):
transformers says how, and its tables are used here as they are.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from trainer.checkpoint_format import (
    DTYPES,
    MODEL_ROLES,
    ChunkReader,
    StoredTensor,
    is_checkpoint,
    read_manifest,
    verify_sizes,
)
from trainer.config.model_config import load_model_config
from trainer.errors import ConfigError, Problem, first_line
from trainer.model.initialize import Complete, initialize_buffers, initialize_module
from trainer.model.unexpected_keys import SHOWN, Leftovers, classify, refuse_quantized, shown
from trainer.model.unexpected_keys import Stored as Header
from trainer.sharding import Shard, local_and_remote_parameters, shard_of

log = logging.getLogger(__name__)


class _Slice:
    """A tensor in a checkpoint, of which any box can be copied out."""

    def __init__(self, files: ChunkReader, stored: StoredTensor) -> None:
        self._files, self._stored = files, stored

    def get_shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        ranges = [range(*part.indices(length)) for part, length in zip(box, self._stored.shape, strict=True)]
        found = torch.empty([len(part) for part in ranges], dtype=DTYPES[self._stored.dtype])
        self._files.read(self._stored, tuple(part.start for part in ranges), found)
        return found


class _Checkpoint:
    """The weights and buffers of a checkpoint, which bear the model's own names."""

    def __init__(self, folder: Path) -> None:
        manifest, self._files = read_manifest(folder), ChunkReader(folder)
        verify_sizes(folder, manifest)
        self._stored = {name: stored for (name, role), stored in manifest.tensors.items() if role in MODEL_ROLES}

    def names(self) -> list[str]:
        return list(self._stored)

    def slice(self, name: str) -> Any:
        return _Slice(self._files, self._stored[name])

    def header(self, name: str) -> Header:
        return Header(self._stored[name].dtype, self._stored[name].shape)

    def file_of(self, name: str) -> str:
        """Names of the files that hold the tensor."""
        return ", ".join(dict.fromkeys(chunk.file for chunk in self._stored[name].chunks))

    def whole(self, name: str) -> Tensor:
        view = self.slice(name)
        whole: Tensor = view[tuple(slice(None) for _ in view.get_shape())]
        return whole


class _Files:
    """The tensors of a folder or of a hub repository, by name, in files that are mapped into memory."""

    def __init__(self, path: str) -> None:
        self._of: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        for file in self._find(path):
            handle = safe_open(file, framework="pt")
            names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
            self._of.update(dict.fromkeys(names, handle))
            self._file.update(dict.fromkeys(names, Path(file).name))

    @staticmethod
    def _find(path: str) -> list[str]:
        folder = Path(path).expanduser()
        where = str(folder) if folder.is_dir() else path
        quiet = {"_raise_exceptions_for_missing_entries": False}
        if (single := cached_file(where, SAFE_WEIGHTS_NAME, **quiet)) is not None:
            return [single]
        index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, **quiet)
        if index is None:
            raise FileNotFoundError(f"it holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        if folder.is_dir():
            names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            return [str(folder / name) for name in names]
        files: list[str] = get_checkpoint_shard_files(where, index)[0]
        return files

    def names(self) -> list[str]:
        return sorted(self._of, key=dot_natural_key)

    def slice(self, name: str) -> Any:
        """A view of a tensor in its file, of which any box can be copied out."""
        view: Any = self._of[name].get_slice(name)
        return view

    def header(self, name: str) -> Header:
        """What the file says about the tensor, without reading the tensor itself."""
        view = self._of[name].get_slice(name)
        return Header(view.get_dtype(), tuple(view.get_shape()))

    def file_of(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._file[name]

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor


_Source = _Files | _Checkpoint


@dataclass
class _Target:
    """A tensor of the model, and the tensors in the files that it is made of."""

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(name in the files, pattern of the converter that it matches, if any)."""

    converter: WeightConverter | None = None

    def boxes(self, files: _Source) -> dict[str, tuple[int, ...]] | None:
        """Where each source begins in the target, if the target is nothing but its sources side by side."""
        if self.converter is None:
            return {self.sources[0][0]: (0,) * len(files.slice(self.sources[0][0]).get_shape())}
        match self.converter.operations:
            case [MergeModulelist(dim=0)] | [MergeModulelist(dim=0), Concatenate(dim=1)]:
                pass
            case _:
                return None
        patterns = list(self.converter.source_patterns)
        places, counts, offsets = {}, dict.fromkeys(patterns, 0), dict.fromkeys(patterns, 0)
        for before, pattern in itertools.pairwise(patterns):
            first = next(name for name, matched in self.sources if matched == before)
            offsets[pattern] = offsets[before] + files.slice(first).get_shape()[0]
        for name, pattern in self.sources:
            rest = len(files.slice(name).get_shape()) - 1
            places[name] = (counts[pattern], offsets[pattern], *(0,) * rest)
            counts[pattern] += 1
        return places


class _Matching:
    """Which tensor of a model each key in the files belongs to, by transformers' own renamings and converters."""

    def __init__(self, model: PreTrainedModel, transforms: list[Any]) -> None:
        self._prefix = model.base_model_prefix
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.shapes = model.state_dict() | dict(local_and_remote_parameters(model))

    def find(self, key: str) -> tuple[str, str | None] | None:
        """(name in the model, pattern of the converter if there is one); None for a key without a place."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.shapes)
        if name not in self.shapes and key in self.shapes:
            name, pattern = rename_source_key(key, [], [], self._prefix, self.shapes)
        return (name, pattern) if name in self.shapes else None


def _unmatched(model: PreTrainedModel, keys: list[str]) -> list[str]:
    """Those of the keys that are neither a weight nor any buffer of the model."""
    matching = _Matching(model, get_model_conversion_mapping(model))
    matching.shapes |= dict(model.named_buffers())
    return [key for key in keys if matching.find(key) is None]


def _targets(model: PreTrainedModel, files: _Source) -> tuple[dict[str, _Target], list[str]]:
    """The model's tensors by name with their sources, and the keys in the files that match none."""
    transforms = get_model_conversion_mapping(model) if isinstance(files, _Files) else []
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    matching = _Matching(model, transforms)
    targets: dict[str, _Target] = {}
    leftover = []
    for key in files.names():
        place = matching.find(key)
        if place is None:
            leftover.append(key)
            continue
        name, pattern = place
        target = targets.setdefault(name, _Target(name))
        target.sources.append((key, pattern or ""))
        target.converter = None if pattern is None else by_pattern[pattern]
    used: Any = [transform for transform in transforms if transform.was_used()]
    if isinstance(files, _Files):
        model._weight_conversions = used  # what `save_pretrained` reverts
    return targets, leftover


def _checked(
    model: PreTrainedModel, path: str, files: _Source, *, allow_unexpected_keys: bool
) -> tuple[dict[str, _Target], Leftovers]:
    """The model's tensors with their sources, and the keys that are left out.

    Raises:
        ConfigError: if the weights are quantized, or hold keys that no class of the family has.
    """
    targets, leftover = _targets(model, files)
    headers = {key: files.header(key) for key in files.names()}
    shapes = model.state_dict() | dict(local_and_remote_parameters(model))
    matched = {key: shapes[t.name].is_floating_point() for t in targets.values() for key, _ in t.sources}
    refuse_quantized(path, matched, headers)
    leftovers = classify(model, _config_of(path), leftover, headers, _unmatched) if leftover else Leftovers([], [])
    if leftovers.unexpected and not allow_unexpected_keys:
        raise ConfigError(
            Problem(
                "model.path",
                f"the weights in '{path}' have unexpected keys, which no class of '{model.config.model_type}' has with "
                f"this configuration (got {len(leftovers.unexpected)}: {shown(leftovers.unexpected)})",
                "Check that config.json and the weights belong together, or set model.allow_unexpected_keys to true "
                "to leave them out",
            )
        )
    return targets, leftovers


_COMPARED_ROWS = 4096


def _refuse_untied(model: PreTrainedModel, path: str, targets: dict[str, _Target], files: _Source) -> None:
    """Compare weights that the files hold under several names though the model ties them.

    transformers does not tie such weights; here one of them would be lost, another one on each pipeline stage.

    Raises:
        ConfigError: naming two keys whose values differ.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in local_and_remote_parameters(model):
        if name in targets and targets[name].converter is None:
            names.setdefault(id(parameter), []).append(targets[name].sources[0][0])
    for first, *others in names.values():
        for other in others:
            if not _are_equal(files.slice(first), files.slice(other)):
                raise ConfigError(
                    Problem(
                        "model.path",
                        f"'{first}' and '{other}' in '{path}' have different values, and the configuration ties them",
                        f"Set tie_word_embeddings to false in {path}/config.json, or delete the one that is not meant",
                    )
                )


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two stored tensors have the same values. A few rows at a time are in memory."""
    shape = tuple(one.get_shape())
    if shape != tuple(other.get_shape()):
        return False
    parts = [slice(start, start + _COMPARED_ROWS) for start in range(0, shape[0], _COMPARED_ROWS)] if shape else [...]
    rest = tuple(slice(None) for _ in shape[1:])
    boxes = [(part, *rest) if shape else () for part in parts]
    return all(torch.equal(one[box].float(), other[box].float()) for box in boxes)


def _config_of(path: str) -> PreTrainedConfig | None:
    """The whole configuration beside the weights, which may be of a larger model; None where there is none."""
    try:
        return load_model_config(path)
    except ConfigError:
        return None


def _open(path: str) -> _Source:
    folder = Path(path).expanduser()
    return _Checkpoint(folder) if is_checkpoint(folder) else _Files(path)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Make hub, network, safetensors and conversion errors alike a problem of `model.path`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        first = first_line(error)
        raise ConfigError(
            Problem("model.path", f"'{path}' cannot be read: {first}", "Check the folder, the name, the network")
        ) from None


def check_weight_headers(model: PreTrainedModel, path: str, *, allow_unexpected_keys: bool = False) -> None:
    """Check what the headers of the weights in a local folder say, without reading the weights.

    Of a name on the hub nothing is checked before its files are here, when they are read.

    Args:
        model: on the meta device.

    Raises:
        ConfigError: if the weights are quantized, or hold keys that no class of the family has.
    """
    if Path(path).expanduser().is_dir():
        with _reading(path):
            _checked(model, path, _open(path), allow_unexpected_keys=allow_unexpected_keys)


def _converted(target: _Target, files: _Source, model: PreTrainedModel) -> dict[str, Tensor]:
    """Whole tensors by name, by transformers' own operations; one converter may make several."""
    converter = copy.deepcopy(target.converter)
    assert converter is not None
    for name, pattern in target.sources:
        converter.add_tensor(target.name, name, pattern, files.whole(name))  # type: ignore[arg-type]
    made = converter.convert(target.name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _copy_boxes(local: Tensor, shard: Shard, boxes: dict[str, tuple[int, ...]], files: _Source) -> None:
    """Copies this rank's part of a target from the files, source by source."""
    if not shard.full_shape:  # a scalar has no dimension that ranges could lie along
        local.copy_(files.whole(next(iter(boxes))))
        return
    for name, start in boxes.items():
        source = files.slice(name)
        shape = (1,) * (len(start) - len(source.get_shape())) + tuple(source.get_shape())
        for here, there in shard.ranges():
            first = max(there.start, start[shard.dim])
            last = min(there.stop, start[shard.dim] + shape[shard.dim])
            if first >= last:
                continue
            inner = [slice(0, size) for size in shape]
            inner[shard.dim] = slice(first - start[shard.dim], last - start[shard.dim])
            outer = [slice(begin, begin + size) for begin, size in zip(start, shape, strict=True)]
            outer[shard.dim] = slice(here.start + first - there.start, here.start + last - there.start)
            read = source[tuple(inner[len(shape) - len(source.get_shape()) :])]
            local[tuple(outer)].copy_(read.reshape(local[tuple(outer)].shape))


def _taking(whole: Tensor) -> Callable[[Tensor, Shard], object]:
    return lambda local, shard: local.copy_(shard.extract(whole))


class _Reader:
    """Fills a model on the meta device."""

    def __init__(self, model: PreTrainedModel, files: _Source, complete: Complete) -> None:
        self._model, self._files, self._complete = model, files, complete
        self._holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._holders.setdefault(parameter, []).append((module, key))
        self._waiting = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(model.named_buffers())
        self._elsewhere = {name for name, _ in local_and_remote_parameters(model)} - self._waiting.keys()
        self.mismatched: list[str] = []
        self.non_finite: list[str] = []
        """Tensors with NaN or infinity among what this rank holds, in words."""

    def fill(self, target: _Target) -> None:
        """Gives the target, or all that its converter makes, its value; nothing of another pipeline stage's."""
        if target.name in self._elsewhere:
            return
        boxes = target.boxes(self._files)
        if boxes is None:
            for name, whole in _converted(target, self._files, self._model).items():
                self._give(name, tuple(whole.shape), _taking(whole), target)
            return
        shapes = [((1,) * (len(at) - len(s)) + s, at) for n, at in boxes.items() for s in [self._shape(n)]]
        full_shape = tuple(max(a + b for a, b in zip(*pair, strict=True)) for pair in self._ends(shapes))
        self._give(target.name, full_shape, lambda local, shard: _copy_boxes(local, shard, boxes, self._files), target)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files.slice(name).get_shape())

    @staticmethod
    def _ends(shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterable[tuple[list[int], list[int]]]:
        for dim in range(len(shapes[0][0])):
            yield [shape[dim] for shape, _ in shapes], [at[dim] for _, at in shapes]

    def _give(
        self, name: str, shape: tuple[int, ...], copy_into: Callable[[Tensor, Shard], object], target: _Target
    ) -> None:
        if name in self._buffers:
            copy_into(self._buffers[name], Shard.full(name, shape, owner=True))
            self._check_finite(name, self._buffers[name], target)
            return
        parameter = self._waiting.pop(name, None)
        if parameter is None or parameter not in self._holders:  # another name of a weight that is there already
            return
        if tuple(parameter.shape) != shape:
            self.mismatched.append(f"{name} {list(shape)} instead of {list(parameter.shape)}")
            return
        shard = shard_of(parameter)
        if shard is None or not shard.covers_full_tensor:
            shard = Shard.full(name, shape, owner=True)
        real = nn.Parameter(torch.zeros(shard.local_shape(), dtype=parameter.dtype), parameter.requires_grad)
        real.__dict__.update(parameter.__dict__)
        with torch.no_grad():
            copy_into(real, shard)
        self._check_finite(name, real.detach(), target)
        for module, key in self._holders.pop(parameter):
            module._parameters[key] = real
        self._complete([real])

    def _check_finite(self, name: str, local: Tensor, target: _Target) -> None:
        """Note NaN or infinity in what has been read. One pass over `local` and no memory: minimum and maximum."""
        if not local.is_floating_point() or not local.numel():
            return
        if all(bool(bound.isfinite()) for bound in torch.aminmax(local)):
            return
        if len(self.non_finite) >= SHOWN:  # the rest is only counted
            self.non_finite.append(name)
            return
        before = len(self.non_finite)
        for source, _ in target.sources:
            whole = self._files.whole(source).to(local.dtype)
            if count := int((~whole.isfinite()).sum()):
                self.non_finite.append(f"{source} in {self._files.file_of(source)}: {count} of {whole.numel()} values")
        if len(self.non_finite) == before:
            self.non_finite.append(f"{name}: after the conversion by transformers")

    def missing(self) -> list[str]:
        """Names of parameters that nothing has filled, and that the family does not compute itself."""
        computed = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_missing or ()]
        missing = []
        for name, parameter in list(self._model.named_parameters()):
            if parameter not in self._holders:
                continue
            if any(pattern.search(name) for pattern in computed):
                initialize_module(self._model, name.rpartition(".")[0], self._complete)
            else:
                missing.append(name)
        return sorted(missing)


def read_weights(
    model: PreTrainedModel,
    path: str,
    complete: Complete = lambda parameters: None,
    *,
    allow_unexpected_keys: bool = False,
) -> None:
    """Fills `model`, which is on the meta device, from `path`: a folder, or a name on the hub.

    A parameter that carries the record of a shard gets that part only. Peak memory beside what this rank holds: the
    largest single tensor.

    Args:
        complete: called with each parameter once it has its value; it may take it away (ZeRO-3).
        allow_unexpected_keys: leave out keys that no class of the family has, instead of refusing them.

    Raises:
        ConfigError: if the files cannot be read, do not hold the model's weights, or hold NaN or infinity among what
            this rank reads.
    """
    log.info("reading weights from %s", path)
    with _reading(path):
        files = _open(path)
        initialize_buffers(model)
        targets, leftovers = _checked(model, path, files, allow_unexpected_keys=allow_unexpected_keys)
        _refuse_untied(model, path, targets, files)
        reader = _Reader(model, files, complete)
        for target in targets.values():
            reader.fill(target)
    if reader.non_finite:
        raise ConfigError(
            Problem(
                "model.path",
                f"weights in '{path}' are NaN or infinite (got {shown(reader.non_finite)})",
                "Take an undamaged copy of the model, or an earlier checkpoint",
            )
        )
    for role, names in (("mismatched", reader.mismatched), ("missing", reader.missing())):
        if names:
            raise ConfigError(
                Problem("model.path", f"weights in '{path}' do not fit the model: {role} {shown(names, 5)}",
                        "Check that config.json and the weights belong together")
            )  # fmt: skip
    if left_out := [*leftovers.unexpected, *leftovers.skipped]:
        unexpected = f" ({len(leftovers.unexpected)} unexpected)" if leftovers.unexpected else ""
        log.info("left out %d keys%s of %s, which %s does not have: %s", len(left_out), unexpected, path,
                 type(model).__name__, shown(left_out))  # fmt: skip
    _read_generation_config(model, path)


def _read_generation_config(model: PreTrainedModel, path: str) -> None:
    folder = Path(path).expanduser()
    if model.can_generate() and is_checkpoint(folder):
        model.generation_config = GenerationConfig.from_dict(dict(read_manifest(folder).model["generation"] or {}))
    elif model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:
            log.info("%s has no generation_config.json; generation takes the defaults of the configuration", path)
