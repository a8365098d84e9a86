"""Tensor plans that Hugging Face lacks, that are wrong there, or that omit the replicated weights. Dictionaries only.

Names are relative to the base model. An entry here overrides Hugging Face's entry of the same name, and None removes
it. A new family is one dictionary here and one row in the table of families.
"""

from __future__ import annotations

from trainer.tensor_parallel.families import (
    decoders,
    encoder_decoders,
    encoders,
    latent_attention,
    linear_attention,
    mixtures,
    recurrent,
)
from trainer.tensor_parallel.families.common import COMMON, FULL_SEQUENCES, UNITS, Entries, Variant

FAMILIES: dict[str, Entries] = {
    **decoders.PLANS,
    **encoders.PLANS,
    **encoder_decoders.PLANS,
    **latent_attention.PLANS,
    **mixtures.PLANS,
    **linear_attention.PLANS,
    **recurrent.PLANS,
}
"""Plans by `model_type`."""

VARIANTS: list[Variant] = [*decoders.VARIANTS, *mixtures.VARIANTS]
"""Plans of configurations that differ from their family's; a later one overrides an earlier one."""

__all__ = ["COMMON", "FAMILIES", "FULL_SEQUENCES", "UNITS", "VARIANTS", "Entries", "Variant"]
