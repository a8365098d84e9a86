"""Environment, logs, key-value store, process groups and collectives of the ranks of a run."""

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.utils.distributed import get_free_port

from trainer.distributed.agreement import agree, run_on_rank_zero
from trainer.distributed.environment import Launch, local_device, prepare_environment
from trainer.distributed.extensions import load_extension
from trainer.distributed.groups import ProcessGroups
from trainer.distributed.join import joined_world
from trainer.distributed.logs import configure_logging
from trainer.distributed.phases import JOIN_TIMEOUT, Phase, PhaseMark, Phases
from trainer.distributed.shared_memory import remove_stale_buffers
from trainer.distributed.store import open_second_connection, open_store
from trainer.distributed.waiting import join_names, publish_value, receive_value, wait_for_keys
from trainer.distributed.world import World, seed_everything

__all__ = [
    "JOIN_TIMEOUT",
    "Launch",
    "Phase",
    "PhaseMark",
    "Phases",
    "PrefixStore",
    "ProcessGroups",
    "Store",
    "World",
    "agree",
    "configure_logging",
    "get_free_port",
    "join_names",
    "joined_world",
    "load_extension",
    "local_device",
    "open_second_connection",
    "open_store",
    "prepare_environment",
    "publish_value",
    "receive_value",
    "remove_stale_buffers",
    "run_on_rank_zero",
    "seed_everything",
    "wait_for_keys",
]
