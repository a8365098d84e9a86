"""The interface between an engine and the training loop through which replicas exchange updates."""

from __future__ import annotations

from typing import Protocol

from trainer.distributed import World
from trainer.engine import Engine


class UpdateMode(Protocol):
    """Wraps the engine of each replica of the model.

    The wrapped engine takes the place of the engine everywhere: in the loop, in evaluation, in checkpoints. A mode that
    changes weights between steps reads and writes the fp32 weights among `engine.state.local_chunks()`, whose views are
    live, and then calls `engine.state.sync_model_weights()`. Additional state belongs into the state of the wrapped
    engine, so that checkpoints contain it.
    """

    def wrap(self, engine: Engine, world: World) -> Engine:
        """Return the engine to train with. Collective: all ranks must call it.

        Args:
            engine: engine of this rank's replica.
            world: the world of this rank.
        """
