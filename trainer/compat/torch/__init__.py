"""Internals of torch."""
