"""Internals of transformers."""
