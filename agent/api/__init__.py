"""What crosses the wire between a scaler (or a watcher) and an agent; the only part of ``agent`` that others import.

- :mod:`agent.api.function`: the ``kind: Function`` document, read from YAML and validated.
- :mod:`agent.api.messages`: commands to agents and reports from them, as typed structs.
- :mod:`agent.api.records`: the start record: what one start did, phase by phase.
- :mod:`agent.api.connection`: length-prefixed msgpack frames over a stream.
"""
