"""Flat vectors: the parameters of a model as one tensor, whole or cut over ranks.

May import isolation, parallel and errors. A newcomer would change something here to store vectors
in another way: `layout` says what a vector must be able to do, `shard_layout` does it for shards.
"""
