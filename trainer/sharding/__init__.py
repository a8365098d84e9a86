"""Shards of tensors: the record of a shard, its chunks in files, joining, remote parameters."""

from trainer.sharding.chunks import chunks_of_flat_range, chunks_of_fragment, chunks_of_shard
from trainer.sharding.join import Joiner
from trainer.sharding.names import wildcard_name
from trainer.sharding.remote import fill_remote_with_zeros, is_remote, local_and_remote_parameters, make_remote
from trainer.sharding.shard import DimShard, Shard, is_owned, set_shard, shard_of
from trainer.sharding.vocabulary import VocabularyShard

__all__ = [
    "DimShard",
    "Joiner",
    "Shard",
    "VocabularyShard",
    "chunks_of_flat_range",
    "chunks_of_fragment",
    "chunks_of_shard",
    "fill_remote_with_zeros",
    "is_owned",
    "is_remote",
    "local_and_remote_parameters",
    "make_remote",
    "set_shard",
    "shard_of",
    "wildcard_name",
]
