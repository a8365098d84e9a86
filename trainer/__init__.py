"""Tessera: train any Hugging Face Transformer in any mix of parallelism on DeepSpeed, from one JSON file."""

__version__ = "0.1.0"
