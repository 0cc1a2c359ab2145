# The topics of scaler/edges/topics.py (a test holds both to the same), and who may use them.

locals {
  hour_ms = 3600 * 1000

  # A small table: the newest record of a key stays.
  table = {
    "cleanup.policy"            = "compact"
    "min.cleanable.dirty.ratio" = "0.2"
    "segment.ms"                = "600000"
  }
  # The broker's clock stamps demand: the age of a replayed level must not depend on the clocks of its sources.
  stamped = { "message.timestamp.type" = "LogAppendTime" }
  durable = {
    "min.insync.replicas" = tostring(coalesce(var.min_insync_replicas, max(1, var.replication_factor - 1)))
  }
  retention = {
    for name, hours in var.retention_hours : name => { "retention.ms" = format("%d", hours * local.hour_ms) } if hours != null
  }

  topics = {
    "thaw.demand"          = { partitions = var.partitions, config = merge(local.stamped, lookup(local.retention, "demand", {})) }
    "thaw.demand.rejected" = { partitions = 1, config = lookup(local.retention, "rejected", {}) }
    "thaw.restores"        = { partitions = var.partitions, config = lookup(local.retention, "restores", {}) }
    "thaw.functions"       = { partitions = 1, config = local.table }
    "thaw.state"           = { partitions = 1, config = local.table }
    "thaw.forecasts"       = { partitions = var.partitions, config = local.table }
  }

  # What each role does to which topic, and to the group. Read and Write imply Describe.
  roles = {
    scalers = {
      "thaw.demand"          = "Read"
      "thaw.functions"       = "Read"
      "thaw.demand.rejected" = "Write"
      "thaw.restores"        = "Write"
      "thaw.state"           = "Write"
      "thaw.forecasts"       = "Read Write"
    }
    producers = {
      "thaw.demand" = "Write"
    }
    operators = {
      "thaw.demand"          = "Read"
      "thaw.demand.rejected" = "Read"
      "thaw.functions"       = "Read Write"
      "thaw.restores"        = "Read"
      "thaw.state"           = "Read"
    }
  }
  uses = flatten([
    [
      for role, topics in local.roles : [
        for topic, operations in topics : [
          for operation in split(" ", operations) : [
            for principal in var.principals[role] : { principal = principal, operation = operation, type = "Topic", name = topic }
          ]
        ]
      ]
    ],
    [for principal in var.principals.scalers : { principal = principal, operation = "Read", type = "Group", name = var.scaler_group }],
  ])
  # A principal may have several roles.
  grants = { for use in local.uses : "${use.principal} ${use.operation} ${use.type} ${use.name}" => use... }
}

resource "kafka_topic" "this" {
  for_each = local.topics

  name               = each.key
  partitions         = each.value.partitions
  replication_factor = var.replication_factor
  config             = merge(each.value.config, local.durable)
}

resource "kafka_acl" "this" {
  for_each = local.grants

  resource_type       = each.value[0].type
  resource_name       = each.value[0].name
  acl_principal       = each.value[0].principal
  acl_host            = var.acl_host
  acl_operation       = each.value[0].operation
  acl_permission_type = "Allow"

  resource_pattern_type_filter = "Literal"

  depends_on = [kafka_topic.this]
}
