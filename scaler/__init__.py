"""Decides what runs where: the planner, which is pure, and the service that connects it to Kafka and the agents."""

from scaler import compiled

compiled.use()
