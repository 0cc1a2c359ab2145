variable "kubeconfig" {
  description = "Path of the kubeconfig of the cluster."
  type        = string
  nullable    = false
}

variable "kubernetes_context" {
  description = "Context in the kubeconfig; null: its current one."
  type        = string
  default     = null
}

variable "kafka" {
  description = "How Terraform reaches the brokers. username null: without SASL; mechanism: plain, scram-sha256 or scram-sha512. ca_cert: PEM."
  type = object({
    bootstrap_servers = list(string)
    tls               = optional(bool, true)
    ca_cert           = optional(string)
    username          = optional(string)
    password          = optional(string)
    mechanism         = optional(string)
  })
  nullable  = false
  sensitive = true

  validation {
    condition     = length(var.kafka.bootstrap_servers) > 0 && alltrue([for server in var.kafka.bootstrap_servers : can(regex("^[^:/ ]+:[0-9]+$", server))])
    error_message = "kafka.bootstrap_servers must be HOST:PORT, one at least."
  }
}

variable "kafka_bootstrap_servers_in_cluster" {
  description = "HOST:PORT of the brokers as pods reach them; null: as Terraform does."
  type        = string
  default     = null
}

variable "partitions" {
  description = "Partitions of the demand topic: at most this many scalers share the work."
  type        = number
  default     = 4
  nullable    = false
}

variable "replication_factor" {
  description = "Brokers that hold each partition."
  type        = number
  default     = 3
  nullable    = false
}

variable "principals" {
  description = "Kafka principals of scalers, producers of demand, and operators; see module kafka. Empty for brokers without an authorizer."
  type = object({
    scalers   = optional(set(string), [])
    producers = optional(set(string), [])
    operators = optional(set(string), [])
  })
  default  = {}
  nullable = false
}

variable "bucket" {
  description = "Name of the bucket for checkpoints."
  type        = string
  nullable    = false
}

variable "image_keys_folder" {
  description = "Folder that `thaw keys make` wrote: the keys that seal checkpoint images go into a Secret, and into Terraform's state. null: fill Secret thaw-image-keys by other means."
  type        = string
  default     = null
}

variable "region" {
  description = "AWS region, or what a compatible store calls so."
  type        = string
  default     = "us-east-1"
  nullable    = false
}

variable "s3_endpoint" {
  description = "Address of an S3-compatible store; null: AWS."
  type        = string
  default     = null
}

variable "s3_credentials" {
  description = "Keys of the agents, where they have no role of their own; Terraform uses them too when s3_endpoint is set. Null: none."
  type = object({
    access_key = string
    secret_key = string
  })
  default   = null
  sensitive = true
}

variable "s3_versioning" {
  description = "Keep deleted objects for some days."
  type        = bool
  default     = true
  nullable    = false
}

variable "force_destroy" {
  description = "Let `terraform destroy` remove a bucket that holds checkpoints."
  type        = bool
  default     = false
  nullable    = false
}

variable "agent_role_arn" {
  description = "IAM role for the agents' service account (EKS); null: none."
  type        = string
  default     = null
}

variable "images" {
  description = "Images of scaler and agent; see module kubernetes."
  type = object({
    scaler = optional(string)
    agent  = optional(string)
  })
  default  = {}
  nullable = false
}

variable "settings" {
  description = "More settings of Thaw: section to field to value."
  type        = map(map(string))
  default     = {}
  nullable    = false
}

variable "scaler_secrets" {
  description = "Environment of the scalers that nobody should read: THAW_KAFKA_PASSWORD, beside settings.kafka.username, security_protocol and sasl_mechanism."
  type        = map(string)
  default     = {}
  nullable    = false
  sensitive   = true
}

variable "certificate_issuer" {
  description = "cert-manager's issuer for scaler and agents; see module kubernetes. Null: the Secrets thaw-agent-tls and thaw-scaler-tls come from elsewhere."
  type = object({
    name  = string
    kind  = optional(string, "Issuer")
    group = optional(string, "cert-manager.io")
  })
  default = null
}

variable "scaler_replicas" {
  description = "Scalers."
  type        = number
  default     = 2
  nullable    = false
}

variable "wait_for_rollout" {
  description = "Return from apply only when scalers and agents are available."
  type        = bool
  default     = true
  nullable    = false
}
