"""From sources of text to micro-batches: read, tokenise once, index, order, pack."""

from trainer.data.appearance import prepared_facts, source_facts
from trainer.data.batches import IGNORED, EvaluationBatches, MicroBatch, StepBatch, TrainBatches
from trainer.data.epochs import count_steps
from trainer.data.frame import DocumentFrame, frame_of, prompt_prefix
from trainer.data.open import Batches, open_batches
from trainer.data.prepare import PreparedData, document_frame, prepare_data
from trainer.data.tokenizer import load_tokenizer

__all__ = [
    "IGNORED",
    "Batches",
    "DocumentFrame",
    "EvaluationBatches",
    "MicroBatch",
    "PreparedData",
    "StepBatch",
    "TrainBatches",
    "count_steps",
    "document_frame",
    "frame_of",
    "load_tokenizer",
    "open_batches",
    "prepare_data",
    "prepared_facts",
    "prompt_prefix",
    "source_facts",
]
