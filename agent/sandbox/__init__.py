"""Where an instance lives: namespaces, root files, network, limits.

:mod:`agent.sandbox.local` makes and drives one sandbox (its PID 1 is ``init.c``), :mod:`agent.sandbox.network` gives it an address,
:mod:`agent.sandbox.cgroup` its limits, :mod:`agent.sandbox.rootfs` its files, and :mod:`agent.sandbox.pool` keeps some ready.
"""
