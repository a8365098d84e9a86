"""Makes safetensors of the fp32 weights in a checkpoint of DeepSpeed's, whatever else its pickles would like to run.

    python deepspeed_to_safetensors.py FOLDER OUT.safetensors

A script for a process of its own. torch's unpickler is told to make nothing but tensors and plain values; what is of
DeepSpeed's own types, such as its loss scaler, becomes an empty object, and anything else ends the process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_load = torch.load
_GETATTR = "builtins.getattr"


class _Nothing:
    """In place of an object of DeepSpeed's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str) -> Any:
    if name == _GETATTR:
        return _enum_member
    return int if name.endswith("ZeroStageEnum") else _Nothing


def _enum_member(stand_in: Any, name: Any) -> Any:
    """In place of `getattr`, by which early releases of Python 3.11 pickle members of enumerations; gives no others."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return int(ZeroStageEnum[name]) if stand_in is int else _Nothing()


def _load_tensors(file: Any, **_: Any) -> Any:
    names = get_unsafe_globals_in_checkpoint(file)
    foreign = [name for name in names if not name.startswith("deepspeed.") and name != _GETATTR]
    if foreign:
        raise SystemExit(f"{file} would run {foreign[0]}: refused, a checkpoint holds tensors and settings")
    stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
    with safe_globals(stand_ins):
        return _load(file, map_location="cpu", weights_only=True)


def main(source: str, out: str) -> None:
    folder = Path(source)
    pointer = folder / "latest"
    tagged = folder / Path(pointer.read_text().strip()).name if pointer.is_file() else folder
    torch.load = _load_tensors  # type: ignore[assignment]
    if list(tagged.glob("mp_rank_01*")):
        raise SystemExit(f"{tagged} is of a run with model parallelism: only plain data-parallel ones can be imported")
    if list(tagged.glob("*_optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        found = get_fp32_state_dict_from_zero_checkpoint(str(tagged.parent), tag=tagged.name)
    else:
        (file,) = tagged.glob("mp_rank_00_model_states.pt")
        found = _load_tensors(file)["module"]
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
