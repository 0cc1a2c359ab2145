# One installation: topics, bucket and cluster objects, each knowing what it needs of the others.

provider "kafka" {
  bootstrap_servers = var.kafka.bootstrap_servers
  tls_enabled       = var.kafka.tls
  ca_cert           = var.kafka.ca_cert
  sasl_username     = var.kafka.username
  sasl_password     = var.kafka.password
  sasl_mechanism    = var.kafka.mechanism
}

provider "aws" {
  region = var.region

  # Only for a store other than AWS, which has neither accounts nor metadata.
  access_key                  = var.s3_endpoint == null ? null : var.s3_credentials.access_key
  secret_key                  = var.s3_endpoint == null ? null : var.s3_credentials.secret_key
  s3_use_path_style           = var.s3_endpoint != null
  skip_credentials_validation = var.s3_endpoint != null
  skip_metadata_api_check     = var.s3_endpoint != null
  skip_region_validation      = var.s3_endpoint != null
  skip_requesting_account_id  = var.s3_endpoint != null

  endpoints {
    s3 = var.s3_endpoint
  }
}

provider "kubernetes" {
  config_path    = var.kubeconfig
  config_context = var.kubernetes_context
}

module "kafka" {
  source = "../modules/kafka"

  partitions         = var.partitions
  replication_factor = var.replication_factor
  principals         = var.principals
}

module "s3" {
  source = "../modules/s3"

  bucket           = var.bucket
  region           = var.region
  endpoint_url     = var.s3_endpoint == null ? "" : var.s3_endpoint
  compatible_store = var.s3_endpoint != null
  versioning       = var.s3_versioning
  force_destroy    = var.force_destroy
  policy_name      = var.s3_endpoint == null ? "${var.bucket}-agent" : ""
}

locals {
  bootstrap_servers = nonsensitive(join(",", var.kafka.bootstrap_servers))
  # Later ones win; what the user sets wins over all.
  layers = [
    { kafka = { bootstrap_servers = local.bootstrap_servers } },
    module.kafka.settings,
    module.s3.settings,
    var.settings,
  ]
  settings = {
    for section in distinct(flatten([for layer in local.layers : keys(layer)])) :
    section => merge([for layer in local.layers : lookup(layer, section, {})]...)
  }
  secrets = {
    for name, value in {
      THAW_S3_ACCESS_KEY = try(var.s3_credentials.access_key, "")
      THAW_S3_SECRET_KEY = try(var.s3_credentials.secret_key, "")
    } : name => value if value != ""
  }
}

module "kubernetes" {
  source = "../modules/kubernetes"

  images             = var.images
  scaler_replicas    = var.scaler_replicas
  agent_secrets      = local.secrets
  scaler_secrets     = var.scaler_secrets
  certificate_issuer = var.certificate_issuer
  image_keys         = var.image_keys_folder == null ? {} : { for name in ["ring", "signing", "trusted"] : name => file("${var.image_keys_folder}/${name}") }
  settings = merge(local.settings, {
    kafka = merge(local.settings.kafka, { bootstrap_servers = coalesce(var.kafka_bootstrap_servers_in_cluster, local.settings.kafka.bootstrap_servers) })
  })
  agent_service_account_annotations = { for arn in compact([var.agent_role_arn]) : "eks.amazonaws.com/role-arn" => arn }
  wait_for_rollout                  = var.wait_for_rollout

  # The settings are known before there is anything behind them.
  depends_on = [module.kafka, module.s3]
}
