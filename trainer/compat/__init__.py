"""Internals of our dependencies, one package per dependency."""
