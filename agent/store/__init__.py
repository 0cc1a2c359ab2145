"""Checkpoints: their format, in S3 and on the node.

:mod:`agent.store.manifest` is the format, :mod:`agent.store.archive` packs files, :mod:`agent.store.chunks` moves pages,
:mod:`agent.store.publish` writes a checkpoint to S3, and :mod:`agent.store.cache` holds checkpoints on the node.
"""
