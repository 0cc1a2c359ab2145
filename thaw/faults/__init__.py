"""Deterministic simulation of faults: the shipped scaler and agent, their processes, network, broker, store and clocks in one loop.

In: a seed (:mod:`thaw.faults.plan` makes demand and faults of it). Out: what went wrong, if anything, as a short story
(:mod:`thaw.faults.shrink`). The code of :mod:`scaler` and :mod:`agent` runs as shipped, asyncio and all, on an event loop whose time is a
number (:mod:`thaw.faults.loop`). What is modelled is what it stands on: network (:mod:`thaw.faults.network`), Kafka
(:mod:`thaw.faults.broker`), machines (:mod:`thaw.faults.machine`) with their processes and images (:mod:`thaw.faults.parts`).
docs/faults.md says what is checked.
"""
