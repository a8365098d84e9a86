"""Tools for developers and users: `python -m tools.NAME`."""
