variable "partitions" {
  description = "Partitions of thaw.demand and thaw.restores. A partition of thaw.demand is a shard: at most this many scalers share the work. Partitions can be added, never removed, and scalers restart when some are."
  type        = number
  default     = 4
  nullable    = false

  validation {
    condition     = var.partitions >= 1 && var.partitions <= 10000 && floor(var.partitions) == var.partitions
    error_message = "partitions must be a whole number from 1 to 10000."
  }
}

variable "replication_factor" {
  description = "Brokers that hold each partition. 3 survives the loss of one broker without loss of writes; 1 is for a broker that is alone."
  type        = number
  default     = 3
  nullable    = false

  validation {
    condition     = var.replication_factor >= 1 && var.replication_factor <= 15 && floor(var.replication_factor) == var.replication_factor
    error_message = "replication_factor must be a whole number from 1 to 15."
  }
}

variable "min_insync_replicas" {
  description = "Replicas that must have a record before its producer is told so. Null: one less than replication_factor, at least 1."
  type        = number
  default     = null

  validation {
    condition     = var.min_insync_replicas == null ? true : var.min_insync_replicas >= 1 && var.min_insync_replicas <= var.replication_factor
    error_message = "min_insync_replicas must be from 1 to replication_factor."
  }
}

variable "retention_hours" {
  description = "How long records are kept. demand: what a scaler that takes over reads again, and what `thaw simulate` can replay. rejected: demand that could not be read. restores: one record per start. Null: the broker's default."
  type = object({
    demand   = optional(number, 24)
    rejected = optional(number)
    restores = optional(number)
  })
  default  = {}
  nullable = false

  validation {
    condition     = alltrue([for hours in values(var.retention_hours) : hours == null ? true : hours > 0 && hours <= 87600])
    error_message = "retention_hours must be above 0 and at most 87600 (ten years)."
  }

  validation {
    # infra/settings.py: scaler.replay_max_s is an hour.
    condition     = var.retention_hours.demand == null ? true : var.retention_hours.demand >= 1
    error_message = "retention_hours.demand must be at least 1: a scaler that takes over reads up to an hour of demand."
  }
}

variable "scaler_group" {
  description = "Consumer group of the scalers (setting scaler.group)."
  type        = string
  default     = "thaw-scaler"
  nullable    = false

  validation {
    condition     = can(regex("^[A-Za-z0-9._-]{1,249}$", var.scaler_group))
    error_message = "scaler_group must be 1 to 249 letters, digits, dots, dashes or underscores."
  }
}

variable "principals" {
  description = "Who may do what, as Kafka names them (User:NAME). scalers: read demand and functions, write state, starts and rejected demand. producers: write demand, which is how gateways and applications report it. operators: `thaw apply | get | delete | simulate`. A role without principals gets no ACL."
  type = object({
    scalers   = optional(set(string), [])
    producers = optional(set(string), [])
    operators = optional(set(string), [])
  })
  default  = {}
  nullable = false

  validation {
    condition     = alltrue([for name in flatten([for names in values(var.principals) : tolist(names)]) : can(regex("^[A-Za-z]+:.+$", name))])
    error_message = "A principal has the form User:NAME."
  }
}

variable "acl_host" {
  description = "Address that the principals connect from; * is any."
  type        = string
  default     = "*"
  nullable    = false
}
