"""Tools beside the trainer: `python -m tools.NAME`."""
