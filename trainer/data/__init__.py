"""Data pipeline from text sources to micro-batches: read, tokenize once, index, order, pack."""

from trainer.data.batches import EvaluationBatches, StepBatch, TrainBatches
from trainer.data.epochs import resolve_steps
from trainer.data.facts import prepared_facts, source_facts
from trainer.data.open import Batches, open_batches
from trainer.data.prepare import PreparedData, document_frame, prepare_data
from trainer.data.special_tokens import DocumentFrame, resolve_frame, resolve_prompt_prefix
from trainer.data.tokenizer import load_tokenizer

__all__ = [
    "Batches",
    "DocumentFrame",
    "EvaluationBatches",
    "PreparedData",
    "StepBatch",
    "TrainBatches",
    "document_frame",
    "load_tokenizer",
    "open_batches",
    "prepare_data",
    "prepared_facts",
    "resolve_frame",
    "resolve_prompt_prefix",
    "resolve_steps",
    "source_facts",
]
