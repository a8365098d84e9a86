"""Internals of DeepSpeed."""
