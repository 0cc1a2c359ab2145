"""The node agent: acts on what a scaler decides. Start reading at :mod:`agent.server`, or at :mod:`agent.api` for the wire."""
