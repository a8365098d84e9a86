"""The ranks of a run: environment, logs, the store they share, process groups, agreement."""

from trainer.distributed.agreement import agree
from trainer.distributed.environment import Launch, free_port, local_device, prepare_environment
from trainer.distributed.extensions import load_extension
from trainer.distributed.logs import configure_logging
from trainer.distributed.shared_memory import remove_stale_buffers
from trainer.distributed.store import open_store
from trainer.distributed.world import World, joined_world, seed_everything

__all__ = [
    "Launch", "World", "agree", "configure_logging", "free_port", "joined_world", "load_extension", "local_device",
    "open_store", "prepare_environment", "remove_stale_buffers", "seed_everything",
]  # fmt: skip
