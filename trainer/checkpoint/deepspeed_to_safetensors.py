"""Convert the fp32 weights of a DeepSpeed checkpoint to safetensors without running code from its pickles.

    python deepspeed_to_safetensors.py FOLDER OUT.safetensors

A script for a separate process. torch's unpickler may create only tensors and plain values; objects of DeepSpeed's own
types, such as its loss scaler, become empty stand-ins, and any other type ends the process.
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


class _StandIn:
    """Stand-in for an object of one of DeepSpeed's types."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in_for(name: str) -> object:
    if name == _GETATTR:
        return _enum_member
    return int if name.endswith("ZeroStageEnum") else _StandIn


def _enum_member(stand_in: object, name: str) -> object:
    """Replace `getattr`, by which early releases of Python 3.11 pickle members of enumerations; return nothing else."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return int(ZeroStageEnum[name]) if stand_in is int else _StandIn()


def _load_tensors(file: Path | str, **_: object) -> dict[str, Any]:
    """Load a pickle as `torch.load` does, but with stand-ins for everything that is not a tensor or a plain value."""
    names = get_unsafe_globals_in_checkpoint(file)
    foreign = [name for name in names if not name.startswith("deepspeed.") and name != _GETATTR]
    if foreign:
        raise SystemExit(f"{file} would run {foreign[0]}: refused; a checkpoint may hold only tensors and settings")
    stand_ins: list[Any] = [(_stand_in_for(name), name) for name in names]
    with safe_globals(stand_ins):
        loaded: dict[str, Any] = _load(file, map_location="cpu", weights_only=True)
    return loaded


def main(source: str, out: str) -> None:
    """Convert the checkpoint in the folder `source`, or the one that its pointer `latest` names, to the file `out`."""
    folder = Path(source)
    pointer = folder / "latest"
    tagged = folder / Path(pointer.read_text().strip()).name if pointer.is_file() else folder
    torch.load = _load_tensors  # type: ignore[assignment]  # DeepSpeed's reader below calls it
    if list(tagged.glob("mp_rank_01*")):
        raise SystemExit(f"{tagged} is of a run with model parallelism; only data-parallel runs can be imported")
    if list(tagged.glob("*_optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(str(tagged.parent), tag=tagged.name)
    else:
        (file,) = tagged.glob("mp_rank_00_model_states.pt")
        weights = _load_tensors(file)["module"]
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
