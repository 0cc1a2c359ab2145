# terraform test: what the module makes of the manifests, and which inputs it refuses. No cluster.

mock_provider "kubernetes" {}

variables {
  manifests = "../../../kubernetes/manifests"
}

run "defaults" {
  command = plan

  assert {
    condition     = length(output.objects) == length(distinct(output.objects)) && !contains(output.objects, "ServiceMonitor/thaw") && !contains(output.objects, "Certificate/thaw-agent")
    error_message = "each object once, no ServiceMonitor, no cert-manager"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.containers[0].image == "thaw-agent:0.1.0"
    error_message = "the manifest's image"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.hostPID && kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.containers[0].securityContext.privileged
    error_message = "the agent enters other pods"
  }
  assert {
    condition     = !contains(keys(nonsensitive(kubernetes_manifest.image_keys.manifest)), "data")
    error_message = "image keys that others put into the Secret stay"
  }
  assert {
    condition     = kubernetes_manifest.workload["Deployment/thaw-scaler"].manifest.spec.replicas == 2
    error_message = "two scalers"
  }
}

run "certificates" {
  command = plan

  variables {
    namespace          = "elsewhere"
    certificate_issuer = { name = "ours", kind = "ClusterIssuer" }
    tls_secrets = {
      agent  = { "ca.crt" = "A", "tls.crt" = "C", "tls.key" = "K" }
      scaler = { "ca.crt" = "A", "tls.crt" = "D", "tls.key" = "L" }
    }
  }

  assert {
    condition     = kubernetes_manifest.object["Certificate/thaw-agent"].manifest.spec.issuerRef.kind == "ClusterIssuer" && kubernetes_manifest.object["Certificate/thaw-scaler"].manifest.spec.uris[0] == "thaw://scaler/thaw" && kubernetes_manifest.object["Certificate/thaw-agent"].manifest.metadata.namespace == "elsewhere"
    error_message = "certificates of the issuer"
  }
  assert {
    condition     = nonsensitive(kubernetes_manifest.tls_secret["scaler"].manifest.data["tls.key"]) == base64encode("L") && kubernetes_manifest.tls_secret["agent"].manifest.metadata.namespace == "elsewhere"
    error_message = "Secrets as the pods mount them"
  }
}

run "an_incomplete_certificate" {
  command = plan

  variables {
    tls_secrets = { agent = { "ca.crt" = "A", "tls.crt" = "C" }, scaler = { "ca.crt" = "A", "tls.crt" = "D", "tls.key" = "L" } }
  }

  expect_failures = [var.tls_secrets]
}

run "everything_else" {
  command = plan

  variables {
    namespace       = "elsewhere"
    images          = { agent = "registry.example/agent@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", scaler = "registry.example:5000/scaler:2" }
    scaler_replicas = 5
    settings        = { kafka = { bootstrap_servers = "k:9092" }, agent = { cache_mb = "1024" } }
    agent_secrets   = { THAW_S3_SECRET_KEY = "secret" }
    image_keys      = { ring = "one", trusted = "two" }

    agent_node_selector               = { pool = "functions" }
    agent_tolerations                 = [{ key = "functions", effect = "NoSchedule" }]
    agent_service_account_annotations = { "eks.amazonaws.com/role-arn" = "arn:aws:iam::123456789012:role/agent" }
    service_monitor                   = true
  }

  assert {
    condition     = alltrue([for one in kubernetes_manifest.object : lookup(one.manifest.metadata, "namespace", "elsewhere") == "elsewhere"]) && kubernetes_manifest.namespace.manifest.metadata.name == "elsewhere"
    error_message = "all of it in the namespace"
  }
  assert {
    condition     = alltrue([for one in kubernetes_manifest.object : one.manifest.subjects[0].namespace == "elsewhere" if one.manifest.kind == "ClusterRoleBinding"])
    error_message = "roles for the accounts of the namespace"
  }
  assert {
    condition     = contains(output.objects, "ServiceMonitor/thaw")
    error_message = "the ServiceMonitor"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.containers[0].image == var.images.agent && kubernetes_manifest.workload["Deployment/thaw-scaler"].manifest.spec.template.spec.containers[0].image == var.images.scaler
    error_message = "images"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.nodeSelector == { "kubernetes.io/os" = "linux", pool = "functions" }
    error_message = "nodes"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.spec.tolerations == [{ key = "functions", operator = "Exists", effect = "NoSchedule" }]
    error_message = "taints"
  }
  assert {
    condition     = kubernetes_manifest.workload["Deployment/thaw-scaler"].manifest.spec.replicas == 5
    error_message = "scalers"
  }
  assert {
    condition     = strcontains(output.settings_file, "[kafka]\nbootstrap_servers = \"k:9092\"") && strcontains(output.settings_file, "agents_namespace = \"elsewhere\"") && strcontains(output.settings_file, "agents = \"kubernetes\"\nbroker_patience_s = \"86400\"\nfunctions = \"kubernetes\"") && strcontains(output.settings_file, "cache_mb = \"1024\"\nlisten_port = \"7070\"")
    error_message = "settings"
  }
  assert {
    condition     = kubernetes_manifest.workload["DaemonSet/thaw-agent"].manifest.spec.template.metadata.annotations["thaw.dev/settings"] == substr(sha256(output.settings_file), 0, 16)
    error_message = "other settings, other pods"
  }
  assert {
    condition     = nonsensitive(kubernetes_manifest.agent_secret.manifest.data) == { THAW_S3_SECRET_KEY = base64encode("secret") }
    error_message = "secrets"
  }
  assert {
    condition     = nonsensitive(kubernetes_manifest.image_keys.manifest.data) == { ring = base64encode("one"), trusted = base64encode("two") }
    error_message = "image keys"
  }
  assert {
    condition     = kubernetes_manifest.object["ServiceAccount/thaw-agent"].manifest.metadata.annotations == var.agent_service_account_annotations
    error_message = "the agents' role"
  }
}

run "refuses_a_namespace_that_is_no_label" {
  command = plan
  variables {
    namespace = "Thaw"
  }
  expect_failures = [var.namespace]
}

run "refuses_images_without_a_version" {
  command = plan
  variables {
    images = { agent = "registry.example:5000/agent" }
  }
  expect_failures = [var.images]
}

run "refuses_secrets_in_settings" {
  command = plan
  variables {
    settings = { s3 = { secret_key = "secret" } }
  }
  expect_failures = [var.settings]
}

run "refuses_unknown_sections" {
  command = plan
  variables {
    settings = { kafak = { partitions = "4" } }
  }
  expect_failures = [var.settings]
}

run "refuses_half_scalers" {
  command = plan
  variables {
    scaler_replicas = 1.5
  }
  expect_failures = [var.scaler_replicas]
}

run "refuses_secrets_that_are_no_variables" {
  command = plan
  variables {
    agent_secrets = { "s3-key" = "secret" }
  }
  expect_failures = [var.agent_secrets]
}

run "refuses_keys_without_a_ring" {
  command = plan
  variables {
    image_keys = { trusted = "two" }
  }
  expect_failures = [var.image_keys]
}

run "refuses_operators_that_kubernetes_refuses" {
  command = plan
  variables {
    agent_tolerations = [{ key = "functions", operator = "Is" }]
  }
  expect_failures = [var.agent_tolerations]
}
