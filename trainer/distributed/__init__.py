"""The ranks of a run: environment, logs, the store they share, process groups, agreement."""

from torch.distributed import PrefixStore, Store

from trainer.distributed.agreement import agree
from trainer.distributed.environment import Launch, free_port, local_device, prepare_environment
from trainer.distributed.extensions import load_extension
from trainer.distributed.logs import configure_logging
from trainer.distributed.phases import JOIN_PATIENCE, Mark, Phase, Phases
from trainer.distributed.shared_memory import remove_stale_buffers
from trainer.distributed.store import open_store, second_connection
from trainer.distributed.waiting import hand_out, named, receive, wait_for
from trainer.distributed.world import World, joined_world, seed_everything

__all__ = [
    "JOIN_PATIENCE", "Launch", "Mark", "Phase", "Phases", "PrefixStore", "Store", "World", "agree", "configure_logging",
    "free_port", "hand_out", "joined_world", "load_extension", "local_device", "named", "open_store",
    "prepare_environment", "receive", "remove_stale_buffers", "second_connection", "seed_everything", "wait_for",
]  # fmt: skip
