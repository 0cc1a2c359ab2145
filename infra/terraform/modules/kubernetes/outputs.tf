output "namespace" {
  description = "Namespace of scaler and agents."
  value       = kubernetes_manifest.namespace.manifest.metadata.name
}

output "objects" {
  description = "What was made, as KIND/NAME."
  value       = sort(keys(local.objects))
}

output "settings_file" {
  description = "The settings file of scaler and agents (TOML)."
  value       = local.settings_file
}
