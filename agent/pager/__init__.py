"""Serves the memory of lazily restored instances, in two processes of their own per node.

:mod:`agent.pager.client` (in the agent) talks to :mod:`agent.pager.worker` (the loop), which :mod:`agent.pager.process` (the keeper)
replaces whenever it dies. The worker keeps what it serves in :mod:`agent.pager.state`, which is a function of
:mod:`agent.pager.journal`; it puts pages in place with :mod:`agent.pager.serving` and :mod:`agent.pager.userfault`, by the layout of
:mod:`agent.pager.regions`, and takes their contents from :mod:`agent.pager.images` and :mod:`agent.pager.pages`. Chunks that are not on
the node come through :mod:`agent.pager.downloads`.
"""
