"""Chaos: load on a real installation while its parts are killed and paused, and their network and disks fail.

:mod:`loadgen.chaos.run` does it all. Which fault comes when is decided by :mod:`loadgen.chaos.schedule` from a seed;
:mod:`loadgen.chaos.faults` does and undoes each, on processes (:mod:`loadgen.chaos.targets`), connections (:mod:`loadgen.chaos.proxy`) and
disks (:mod:`loadgen.chaos.disks`) of the installation alone. What was killed is started again by ``thaw run`` and
:mod:`loadgen.chaos.supervision`. What it came to is found by :mod:`loadgen.chaos.recovery` and said by :mod:`loadgen.chaos.report`.
"""
