"""Freeze and restore with CRIU 4.2.

:mod:`agent.criu.protobuf` speaks its wire format, :mod:`agent.criu.images` reads its image files, :mod:`agent.criu.tool` runs it in
a sandbox: dump as a command, restore through a waiting ``swrk`` worker.
"""
