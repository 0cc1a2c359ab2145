"""Serves the memory of lazily restored instances, in one process of its own per node.

:mod:`agent.pager.client` (in the agent) talks to :mod:`agent.pager.process` (the loop), which reads events and copies pages with
:mod:`agent.pager.userfault`, keeps what it serves in :mod:`agent.pager.spaces` and the layout of each address space in
:mod:`agent.pager.regions`, and takes page contents from :mod:`agent.pager.pages`. Chunks that are not on the node come through
:mod:`agent.store.chunks`.
"""
