# terraform test: what the module plans, and which inputs it refuses. No broker.

mock_provider "kafka" {}

run "defaults" {
  command = plan

  assert {
    condition     = keys(kafka_topic.this) == ["thaw.demand", "thaw.demand.rejected", "thaw.forecasts", "thaw.functions", "thaw.restores", "thaw.state"]
    error_message = "six topics"
  }
  assert {
    condition     = { for name, topic in kafka_topic.this : name => topic.partitions } == { "thaw.demand" = 4, "thaw.demand.rejected" = 1, "thaw.forecasts" = 4, "thaw.functions" = 1, "thaw.restores" = 4, "thaw.state" = 1 }
    error_message = "only what is per shard or per start has several partitions"
  }
  assert {
    condition     = alltrue([for topic in kafka_topic.this : topic.replication_factor == 3 && topic.config["min.insync.replicas"] == "2"])
    error_message = "a broker may be lost"
  }
  assert {
    condition     = kafka_topic.this["thaw.demand"].config["message.timestamp.type"] == "LogAppendTime" && kafka_topic.this["thaw.demand"].config["retention.ms"] == "86400000"
    error_message = "demand is stamped by the broker and kept for a day"
  }
  assert {
    condition     = alltrue([for name in ["thaw.forecasts", "thaw.functions", "thaw.state"] : kafka_topic.this[name].config["cleanup.policy"] == "compact"])
    error_message = "tables are compacted"
  }
  assert {
    condition     = length(kafka_acl.this) == 0
    error_message = "no principals, no ACLs"
  }
}

run "one_broker" {
  command = plan

  variables {
    replication_factor = 1
    partitions         = 12
    retention_hours    = { demand = 2, restores = 720 }
  }

  assert {
    condition     = kafka_topic.this["thaw.state"].config["min.insync.replicas"] == "1"
    error_message = "a broker that is alone can't wait for another"
  }
  assert {
    condition     = kafka_topic.this["thaw.demand"].config["retention.ms"] == "7200000" && kafka_topic.this["thaw.restores"].config["retention.ms"] == "2592000000"
    error_message = "retention in ms"
  }
  assert {
    condition     = output.settings.kafka == { partitions = "12", replication_factor = "1" }
    error_message = "settings follow the topics"
  }
}

run "least_privilege" {
  command = plan

  variables {
    principals = { scalers = ["User:s"], producers = ["User:p"], operators = ["User:o", "User:p"] }
  }

  assert {
    condition = [for name in keys(kafka_acl.this) : name if startswith(name, "User:s ")] == [
      "User:s Read Group thaw-scaler",
      "User:s Read Topic thaw.demand",
      "User:s Read Topic thaw.forecasts",
      "User:s Read Topic thaw.functions",
      "User:s Write Topic thaw.demand.rejected",
      "User:s Write Topic thaw.forecasts",
      "User:s Write Topic thaw.restores",
      "User:s Write Topic thaw.state",
    ]
    error_message = "a scaler"
  }
  assert {
    condition = [for name in keys(kafka_acl.this) : name if startswith(name, "User:p ")] == [
      "User:p Read Topic thaw.demand",
      "User:p Read Topic thaw.demand.rejected",
      "User:p Read Topic thaw.functions",
      "User:p Read Topic thaw.restores",
      "User:p Read Topic thaw.state",
      "User:p Write Topic thaw.demand",
      "User:p Write Topic thaw.functions",
    ]
    error_message = "a producer that is an operator too"
  }
  assert {
    condition     = alltrue([for acl in kafka_acl.this : acl.acl_permission_type == "Allow" && acl.resource_pattern_type_filter == "Literal"])
    error_message = "named things only"
  }
}

run "refuses_no_partitions" {
  command = plan
  variables {
    partitions = 0
  }
  expect_failures = [var.partitions]
}

run "refuses_more_in_sync_than_replicas" {
  command = plan
  variables {
    replication_factor  = 2
    min_insync_replicas = 3
  }
  expect_failures = [var.min_insync_replicas]
}

run "refuses_short_demand" {
  command = plan
  variables {
    retention_hours = { demand = 0.5 }
  }
  expect_failures = [var.retention_hours]
}

run "refuses_bare_names" {
  command = plan
  variables {
    principals = { scalers = ["scaler"] }
  }
  expect_failures = [var.principals]
}

run "refuses_groups_that_kafka_refuses" {
  command = plan
  variables {
    scaler_group = "a group"
  }
  expect_failures = [var.scaler_group]
}
