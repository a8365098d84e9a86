"""Which part of a tensor a rank has: the record of a shard, chunks of files, remote parameters, joining to full."""

from trainer.sharding.chunks import boxes_of, flat_boxes, parts_in_whole
from trainer.sharding.join import Joiner
from trainer.sharding.names import starred
from trainer.sharding.remote import all_parameters, fill_elsewhere, lies_elsewhere, put_elsewhere
from trainer.sharding.shard import Shard, counts, mark, shard_of

__all__ = [
    "Joiner",
    "Shard",
    "all_parameters",
    "boxes_of",
    "counts",
    "fill_elsewhere",
    "flat_boxes",
    "lies_elsewhere",
    "mark",
    "parts_in_whole",
    "put_elsewhere",
    "shard_of",
    "starred",
]
