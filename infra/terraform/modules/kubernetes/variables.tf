variable "namespace" {
  description = "Namespace of scaler and agents; it is made. Functions live in the namespaces of their users."
  type        = string
  default     = "thaw"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", var.namespace))
    error_message = "namespace must be a DNS label: lower-case letters, digits and dashes, 63 at most."
  }
}

variable "manifests" {
  description = "Folder of the manifests, the same that `kubectl apply -f` takes. Null: infra/kubernetes/manifests beside this module."
  type        = string
  default     = null
}

variable "images" {
  description = "Images of scaler and agent, best by digest (NAME@sha256:...). Null: the manifests' own."
  type = object({
    scaler = optional(string)
    agent  = optional(string)
  })
  default  = {}
  nullable = false

  validation {
    condition     = alltrue([for image in values(var.images) : image == null ? true : can(regex("^[^ ]+(:[^ /]+|@sha256:[0-9a-f]{64})$", image))])
    error_message = "An image needs a tag or a digest: NAME:TAG or NAME@sha256:DIGEST."
  }
}

variable "settings" {
  description = "Settings of Thaw (infra/settings.py): section to field to value. They become the settings file of scaler and agents, on top of what the manifests need. Merge the outputs `settings` of the modules kafka and s3 in here. No secrets: those go to agent_secrets and scaler_secrets."
  type        = map(map(string))
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for section in keys(var.settings) : contains(["agent", "cluster", "images", "kafka", "kubernetes", "paths", "s3", "scaler", "stack", "telemetry", "tls"], section)])
    error_message = "A section of settings must be one of agent, cluster, images, kafka, kubernetes, paths, s3, scaler, stack, telemetry, tls."
  }

  validation {
    condition     = alltrue([for fields in values(var.settings) : alltrue([for field in keys(fields) : can(regex("^[a-z][a-z0-9_]*$", field))])])
    error_message = "A field of settings is lower case with underscores, such as bootstrap_servers."
  }

  validation {
    condition     = !contains(keys(lookup(var.settings, "s3", {})), "secret_key")
    error_message = "settings.s3.secret_key would be readable in a ConfigMap; put THAW_S3_SECRET_KEY into agent_secrets."
  }

  validation {
    condition     = !contains(keys(lookup(var.settings, "kafka", {})), "password")
    error_message = "settings.kafka.password would be readable in a ConfigMap; put THAW_KAFKA_PASSWORD into agent_secrets and scaler_secrets."
  }
}

variable "certificate_issuer" {
  description = "cert-manager's issuer of the certificates by which scalers and agents know each other: a CA that signs nothing else. cert-manager must be in the cluster. Null: no certificates are requested; see tls_secrets."
  type = object({
    name  = string
    kind  = optional(string, "Issuer")
    group = optional(string, "cert-manager.io")
  })
  default = null
}

variable "tls_secrets" {
  description = "Certificates that come from elsewhere: for agents (SAN URI thaw://agent/*, server auth) and scalers (thaw://scaler/NAME, client auth) the files ca.crt, tls.crt and tls.key. They are kept in Terraform's state. Null where cert-manager or someone else makes the Secrets thaw-agent-tls and thaw-scaler-tls, or settings.tls.mode is off."
  type = object({
    agent  = map(string)
    scaler = map(string)
  })
  default   = null
  sensitive = true

  validation {
    condition     = var.tls_secrets == null ? true : alltrue([for files in [var.tls_secrets.agent, var.tls_secrets.scaler] : length(setsubtract(["ca.crt", "tls.crt", "tls.key"], keys(files))) == 0])
    error_message = "tls_secrets.agent and tls_secrets.scaler each need ca.crt, tls.crt and tls.key."
  }
}

variable "agent_secrets" {
  description = "Environment of the agents from a Secret, such as THAW_S3_ACCESS_KEY and THAW_S3_SECRET_KEY. Empty where the service account or the node brings credentials. They are kept in Terraform's state."
  type        = map(string)
  default     = {}
  nullable    = false
  sensitive   = true

  validation {
    condition     = alltrue([for name in keys(var.agent_secrets) : can(regex("^[A-Z][A-Z0-9_]*$", name))])
    error_message = "agent_secrets are named as environment variables: THAW_S3_SECRET_KEY."
  }
}

variable "image_keys" {
  description = "Files that seal checkpoint images, as `thaw keys make` writes them: { ring, signing, trusted }. They are kept in Terraform's state. Empty: Secret thaw-image-keys is left to others to fill."
  type        = map(string)
  default     = {}
  nullable    = false
  sensitive   = true

  validation {
    condition     = length(var.image_keys) == 0 || length(setsubtract(["ring", "trusted"], keys(var.image_keys))) == 0 && length(setsubtract(keys(var.image_keys), ["ring", "signing", "trusted"])) == 0
    error_message = "image_keys are the files ring, trusted and, for agents that make checkpoints, signing."
  }
}

variable "scaler_secrets" {
  description = "Environment of the scalers from a Secret. They are kept in Terraform's state."
  type        = map(string)
  default     = {}
  nullable    = false
  sensitive   = true

  validation {
    condition     = alltrue([for name in keys(var.scaler_secrets) : can(regex("^[A-Z][A-Z0-9_]*$", name))])
    error_message = "scaler_secrets are named as environment variables."
  }
}

variable "scaler_replicas" {
  description = "Scalers. They share the shards; more than there are partitions of thaw.demand wait."
  type        = number
  default     = 2
  nullable    = false

  validation {
    condition     = var.scaler_replicas >= 0 && var.scaler_replicas <= 1000 && floor(var.scaler_replicas) == var.scaler_replicas
    error_message = "scaler_replicas must be a whole number from 0 to 1000."
  }
}

variable "agent_node_selector" {
  description = "Labels of the nodes that run an agent, beside kubernetes.io/os=linux."
  type        = map(string)
  default     = {}
  nullable    = false
}

variable "agent_tolerations" {
  description = "Taints that agents tolerate, as in a pod."
  type = list(object({
    key      = optional(string)
    operator = optional(string, "Exists")
    value    = optional(string)
    effect   = optional(string)
  }))
  default  = []
  nullable = false

  validation {
    condition     = alltrue([for item in var.agent_tolerations : contains(["Exists", "Equal"], item.operator)])
    error_message = "The operator of a toleration is Exists or Equal."
  }
}

variable "agent_service_account_annotations" {
  description = "Annotations of the agents' service account, such as eks.amazonaws.com/role-arn for a role with the policy of module s3."
  type        = map(string)
  default     = {}
  nullable    = false
}

variable "service_monitor" {
  description = "Also make a ServiceMonitor for the Prometheus operator, whose CRD must be in the cluster already."
  type        = bool
  default     = false
  nullable    = false
}

variable "wait_for_rollout" {
  description = "Return from apply only when scalers and agents are available."
  type        = bool
  default     = true
  nullable    = false
}
