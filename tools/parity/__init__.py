"""Proves that a layout computes what one process computes: loss, every gradient, the parameters after three steps."""
