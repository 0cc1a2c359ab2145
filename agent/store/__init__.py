"""Checkpoints: their format, in S3 and on the node.

:mod:`agent.store.manifest` is the format, :mod:`agent.store.archive` packs files, :mod:`agent.store.chunks` moves pages,
:mod:`agent.store.seal` encrypts and signs what goes to S3, :mod:`agent.store.pointer` says which checkpoint is the current one, and
:mod:`agent.store.cache` holds checkpoints on the node.
"""
