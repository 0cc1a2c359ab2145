# The objects of infra/kubernetes/manifests, the same files that kubectl users apply, with the namespace, images, settings and secrets
# of this installation put in. Nothing is described here a second time.

locals {
  folder = coalesce(var.manifests, "${path.module}/../../../kubernetes/manifests")
  files = concat(
    sort(tolist(fileset(local.folder, "*.yaml"))),
    [for name in ["monitoring/service-monitor.yaml"] : name if var.service_monitor],
    [for name in ["cert-manager/certificates.yaml"] : name if var.certificate_issuer != null],
  )

  documents = merge([
    for name in local.files : {
      for document in [for text in split("\n---\n", file("${local.folder}/${name}")) : yamldecode(text)] :
      "${document.kind}/${document.metadata.name}" => document
    }
  ]...)

  placed = {
    for name, document in local.documents : name => merge(document, {
      metadata = merge(document.metadata, { for key, value in document.metadata : key => var.namespace if key == "namespace" })
    })
  }

  settings = {
    for section in distinct(concat(keys(local.settings_needed), keys(var.settings))) :
    section => merge(lookup(local.settings_needed, section, {}), lookup(var.settings, section, {}))
  }
  # Where the pods of the manifests have their volumes and ports.
  settings_needed = {
    paths     = { cache_dir = "/opt/thaw", runtime_dir = "/run/thaw", state_dir = "/var/lib/thaw" }
    agent     = { listen_port = "7070", sandboxes = "pods" }
    scaler    = { agents = "kubernetes", functions = "kubernetes", broker_patience_s = "86400" }
    telemetry = { health_host = "0.0.0.0", health_port = "9464" }
    tls       = { ca = "/etc/thaw-tls/ca.crt", certificate = "/etc/thaw-tls/tls.crt", key = "/etc/thaw-tls/tls.key" }
    kubernetes = {
      agents_namespace = var.namespace
      agent_image      = coalesce(var.images.agent, local.placed["DaemonSet/thaw-agent"].spec.template.spec.containers[0].image)
    }
  }
  # TOML: a JSON string is one of its strings, and Thaw reads numbers from strings too.
  settings_file = join("\n", [
    for section in sort(keys(local.settings)) : join("\n", concat(
      ["[${section}]"],
      [for field in sort(keys(local.settings[section])) : "${field} = ${jsonencode(local.settings[section][field])}"],
      [""],
    ))
  ])

  # Pods read the settings file at their start: another file is another pod.
  settings_annotation = { "thaw.dev/settings" = substr(sha256(local.settings_file), 0, 16) }

  agent  = local.placed["DaemonSet/thaw-agent"]
  scaler = local.placed["Deployment/thaw-scaler"]

  certificates = {
    for name in ["Certificate/thaw-agent", "Certificate/thaw-scaler"] :
    name => { spec = merge(local.placed[name].spec, { issuerRef = var.certificate_issuer }) } if var.certificate_issuer != null
  }

  changes = merge(local.certificates, {
    "Namespace/thaw" = {
      metadata = merge(local.placed["Namespace/thaw"].metadata, { name = var.namespace })
    }
    "ConfigMap/thaw" = {
      data = { "thaw.toml" = local.settings_file }
    }
    "ServiceAccount/thaw-agent" = {
      for key, value in { metadata = merge(local.placed["ServiceAccount/thaw-agent"].metadata, { annotations = var.agent_service_account_annotations }) } :
      key => value if length(var.agent_service_account_annotations) > 0
    }
    "ClusterRoleBinding/thaw-agent" = {
      subjects = [for subject in local.placed["ClusterRoleBinding/thaw-agent"].subjects : merge(subject, { namespace = var.namespace })]
    }
    "ClusterRoleBinding/thaw-scaler" = {
      subjects = [for subject in local.placed["ClusterRoleBinding/thaw-scaler"].subjects : merge(subject, { namespace = var.namespace })]
    }
    "DaemonSet/thaw-agent" = {
      spec = merge(local.agent.spec, {
        template = merge(local.agent.spec.template, {
          metadata = merge(local.agent.spec.template.metadata, { annotations = local.settings_annotation })
          spec = merge(
            local.agent.spec.template.spec,
            {
              containers   = [for one in local.agent.spec.template.spec.containers : merge(one, { image = coalesce(var.images.agent, one.image) })]
              nodeSelector = merge(local.agent.spec.template.spec.nodeSelector, var.agent_node_selector)
            },
            {
              for key, value in { tolerations = [for item in var.agent_tolerations : { for field, set in item : field => set if set != null }] } :
              key => value if length(var.agent_tolerations) > 0
            },
          )
        })
      })
    }
    "Deployment/thaw-scaler" = {
      spec = merge(local.scaler.spec, {
        replicas = var.scaler_replicas
        template = merge(local.scaler.spec.template, {
          metadata = merge(local.scaler.spec.template.metadata, { annotations = local.settings_annotation })
          spec = merge(local.scaler.spec.template.spec, {
            containers = [for one in local.scaler.spec.template.spec.containers : merge(one, { image = coalesce(var.images.scaler, one.image) })]
          })
        })
      })
    }
  })

  # Values may be known only after apply; what kind of object it is must be known to the plan.
  objects = merge(local.placed, { for name, change in local.changes : name => merge(local.placed[name], change) })

  first     = ["Namespace/thaw", "CustomResourceDefinition/functions.thaw.dev"]
  secrets   = ["Secret/thaw-agent", "Secret/thaw-image-keys", "Secret/thaw-scaler"]
  workloads = ["DaemonSet/thaw-agent", "Deployment/thaw-scaler"]
}

resource "kubernetes_manifest" "namespace" {
  manifest = local.objects["Namespace/thaw"]
}

resource "kubernetes_manifest" "functions" {
  manifest = local.objects["CustomResourceDefinition/functions.thaw.dev"]

  wait {
    condition {
      type   = "Established"
      status = "True"
    }
  }
}

resource "kubernetes_manifest" "object" {
  for_each = toset([for name in keys(local.objects) : name if !contains(concat(local.first, local.secrets, local.workloads), name)])

  manifest = local.objects[each.key]

  depends_on = [kubernetes_manifest.namespace]
}

resource "kubernetes_manifest" "agent_secret" {
  manifest = merge(local.objects["Secret/thaw-agent"], { data = { for name, value in var.agent_secrets : name => base64encode(value) } })

  depends_on = [kubernetes_manifest.namespace]
}

resource "kubernetes_manifest" "image_keys" {
  manifest = merge(local.objects["Secret/thaw-image-keys"], {
    for field, value in { data = { for name, content in var.image_keys : name => base64encode(content) } } : field => value
    if length(nonsensitive(keys(var.image_keys))) > 0
  })

  depends_on = [kubernetes_manifest.namespace]
}

resource "kubernetes_manifest" "scaler_secret" {
  manifest = merge(local.objects["Secret/thaw-scaler"], { data = { for name, value in var.scaler_secrets : name => base64encode(value) } })

  depends_on = [kubernetes_manifest.namespace]
}

resource "kubernetes_manifest" "tls_secret" {
  for_each = nonsensitive(var.tls_secrets == null) ? toset([]) : toset(["agent", "scaler"])

  manifest = {
    apiVersion = "v1"
    kind       = "Secret"
    metadata   = { name = "thaw-${each.key}-tls", namespace = var.namespace }
    type       = "kubernetes.io/tls"
    data       = { for name, value in var.tls_secrets[each.key] : name => base64encode(value) }
  }

  depends_on = [kubernetes_manifest.namespace]
}

resource "kubernetes_manifest" "workload" {
  for_each = toset(local.workloads)

  manifest = local.objects[each.key]

  wait {
    rollout = var.wait_for_rollout
  }

  depends_on = [
    kubernetes_manifest.agent_secret,
    kubernetes_manifest.functions,
    kubernetes_manifest.image_keys,
    kubernetes_manifest.object,
    kubernetes_manifest.scaler_secret,
    kubernetes_manifest.tls_secret,
  ]
}
