"""The scaler's side of Kubernetes.

Which module does what: :mod:`.operator` puts the others together for :mod:`scaler.service`; :mod:`.functions` turns resources into events;
:mod:`.agents` finds the agents' pods; :mod:`.controller` makes and removes placeholder pods as :mod:`.pods` (pure) says; :mod:`.writer`
tells each function's status, which :mod:`.status` (pure) makes; :mod:`.recorder` posts Events; :mod:`.queue` hands out names of functions.

There is no leader: every scaler watches everything, and acts for a function only while it owns the function's shard.
"""
