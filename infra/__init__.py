"""What connects Thaw to the world: settings, tasks, telemetry, Kafka, S3, the embedded stack. Imports no other package of Thaw."""
