"""Where an instance lives: namespaces, root files, network, limits.

:mod:`agent.sandbox.local` drives one sandbox (its PID 1 is ``init.c``), :mod:`agent.sandbox.factory` makes and takes over sandboxes,
:mod:`agent.sandbox.network` gives them addresses, :mod:`agent.sandbox.cgroup` limits, :mod:`agent.sandbox.rootfs` and
:mod:`agent.sandbox.mounts` files, and :mod:`agent.sandbox.pool` keeps some ready.
"""
