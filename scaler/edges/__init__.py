"""What connects the scaler to the world: :mod:`scaler.edges.kafka`, :mod:`scaler.edges.agents` and their helpers."""
