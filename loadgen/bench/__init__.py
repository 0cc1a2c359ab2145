"""``thaw bench restore``: what each rung of the ladder costs, on the machine it runs on.

In: sample functions, a stack and an agent that the bench starts for itself. Out: one JSON object, a report and the raw records. Each part
is a module: :mod:`~loadgen.bench.modes` (one start at a time, by start mode), :mod:`~loadgen.bench.fanout` (many starts at once),
:mod:`~loadgen.bench.density` (many standbys), :mod:`~loadgen.bench.demand` (from a demand record through the real broker). They are put
together in :mod:`~loadgen.bench.run`, judged in :mod:`~loadgen.bench.goals` and shown by :mod:`~loadgen.bench.report`.
"""
