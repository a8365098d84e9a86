"""Tensor plans that Hugging Face lacks, has wrong, or leaves without the weights that stay whole. Dictionaries only.

Names and words are those of `trainer.tensor_parallel.plan`; names count from the base model. A row here overrides
Hugging Face's row of the same name; None takes Hugging Face's row away. A new family is one dictionary here and one row
in the table of families.
"""

from __future__ import annotations

from trainer.tensor_parallel.families import decoders, encoders, mixtures, recurrent
from trainer.tensor_parallel.families.common import COMMON, UNITS, WHOLE_SEQUENCES

FAMILIES: dict[str, dict[str, str | None]] = {
    **decoders.PLANS,
    **encoders.PLANS,
    **mixtures.PLANS,
    **recurrent.PLANS,
}
"""Plans by `model_type`."""

__all__ = ["COMMON", "FAMILIES", "UNITS", "WHOLE_SEQUENCES"]
