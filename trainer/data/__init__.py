"""From sources of text to micro-batches: read, tokenise once, index, order, pack."""

from trainer.data.batches import IGNORED, EvaluationBatches, MicroBatch, StepBatch, TrainBatches
from trainer.data.open import Batches, open_batches
from trainer.data.prepare import PreparedData, prepare_data
from trainer.data.tokenizer import load_tokenizer

__all__ = [
    "IGNORED",
    "Batches",
    "EvaluationBatches",
    "MicroBatch",
    "PreparedData",
    "StepBatch",
    "TrainBatches",
    "load_tokenizer",
    "open_batches",
    "prepare_data",
]
