"""The synchronous update mode."""

from __future__ import annotations

from trainer.distributed import World
from trainer.engine import Engine


class Synchronous:
    """All data ranks average their gradients in every step. DeepSpeed does so; the engine is used as it is."""

    def wrap(self, engine: Engine, world: World) -> Engine:
        """See `UpdateMode.wrap`."""
        return engine
