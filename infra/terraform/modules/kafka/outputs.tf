output "topics" {
  description = "Partitions of each topic."
  value       = { for name, topic in kafka_topic.this : name => topic.partitions }
}

output "settings" {
  description = "Thaw's settings that follow from the topics: section to field to value, for the settings file or THAW_<SECTION>_<FIELD>."
  value = {
    kafka = {
      partitions         = tostring(var.partitions)
      replication_factor = tostring(var.replication_factor)
    }
    scaler = {
      group = var.scaler_group
    }
  }
}
