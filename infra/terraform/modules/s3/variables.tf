variable "bucket" {
  description = "Name of the bucket."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket must be 3 to 63 lower-case letters, digits and dashes (no dots: they break TLS names)."
  }
}

variable "compatible_store" {
  description = "True for an S3-compatible store that knows buckets, versions and policies and nothing else (versitygw). AWS's public access block, ownership, default encryption, lifecycle and IAM policy are then left out: such a store has no public access, and is encrypted and cleaned by its own means."
  type        = bool
  default     = false
  nullable    = false
}

variable "endpoint_url" {
  description = "Address of a store other than AWS, for the settings of Thaw; empty: AWS. Terraform itself reaches it by the configuration of its provider."
  type        = string
  default     = ""
  nullable    = false

  validation {
    condition     = var.endpoint_url == "" || can(regex("^https?://[^/]+$", var.endpoint_url))
    error_message = "endpoint_url must be http(s)://HOST[:PORT], without a path."
  }
}

variable "region" {
  description = "Region, for the settings of Thaw; the bucket is made in that of the provider."
  type        = string
  default     = "us-east-1"
  nullable    = false
}

variable "versioning" {
  description = "Keep deleted and overwritten objects for noncurrent_days. A store that can't (versitygw without --versioning-dir) needs false."
  type        = bool
  default     = true
  nullable    = false
}

variable "noncurrent_days" {
  description = "Days after which versions that are no longer current are removed."
  type        = number
  default     = 7
  nullable    = false

  validation {
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "noncurrent_days must be a whole number of at least 1."
  }
}

variable "kms_key_arn" {
  description = "KMS key that encrypts objects; empty: S3's own key (AES256). Images hold the memory of processes, secrets included."
  type        = string
  default     = ""
  nullable    = false

  validation {
    condition     = var.kms_key_arn == "" || can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "agent_principals" {
  description = "Who the agents are, for the bucket's policy: ARNs of AWS users or roles, or user names of a compatible store. Empty: access comes from the agent policy (output agent_policy_arn) alone."
  type        = set(string)
  default     = []
  nullable    = false
}

variable "functions" {
  description = "Names of the functions whose objects the agents' policies open. Empty: all."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition     = alltrue([for name in var.functions : can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", name))])
    error_message = "functions are names as in metadata.name."
  }
}

variable "policy_name" {
  description = "Name of the IAM policy for agents; empty: none is made, and output agent_policy holds its text."
  type        = string
  default     = ""
  nullable    = false
}

variable "force_destroy" {
  description = "Let `terraform destroy` remove a bucket that holds checkpoints. They can be made again, at the price of a cold start each."
  type        = bool
  default     = false
  nullable    = false
}

variable "tags" {
  description = "Tags of the bucket and the policy."
  type        = map(string)
  default     = {}
  nullable    = false
}
