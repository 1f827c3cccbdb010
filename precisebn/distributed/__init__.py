"""Ranks: the only room that knows torch.distributed.

A run over several ranks is a row of steps (`steps`), the same on every rank, at which the statistics merge (`ranks`) by
all-reduces of one flat float64 buffer: memory does not grow with the number of ranks, and all ranks end with the same
bits. docs/design.md, "Ranks", has the protocol as a whole.
"""

from precisebn.distributed.groups import ProcessGroup, number_of_ranks, sync_group
from precisebn.distributed.ranks import Ranks, Tally
from precisebn.distributed.sharding import (
    communicates,
    describe_shards,
    dtype_of_policy,
    is_sharded,
    reshard,
    shard_unit,
    sharded_flat,
    whole_of,
)
from precisebn.distributed.shuffling import Shuffle, local_shuffle, permutation_of, shuffle_over_ranks

__all__ = [
    "ProcessGroup",
    "Ranks",
    "Shuffle",
    "Tally",
    "communicates",
    "describe_shards",
    "dtype_of_policy",
    "is_sharded",
    "local_shuffle",
    "number_of_ranks",
    "permutation_of",
    "reshard",
    "shard_unit",
    "sharded_flat",
    "shuffle_over_ranks",
    "sync_group",
    "whole_of",
]
