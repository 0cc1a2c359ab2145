output "settings_file" {
  description = "Settings of `thaw` for a person at a terminal: terraform output -raw settings_file > thaw.toml; thaw --config thaw.toml get functions"
  value = join("\n", [
    for section in sort(keys(local.settings)) : join("\n", concat(
      ["[${section}]"],
      [for field in sort(keys(local.settings[section])) : "${field} = ${jsonencode(local.settings[section][field])}"],
      [""],
    ))
  ])
}

output "environment" {
  description = "The same as environment variables, with the credentials: terraform output -json environment"
  sensitive   = true
  value = merge(
    merge([for section, fields in local.settings : { for field, value in fields : upper("THAW_${section}_${field}") => value }]...),
    local.secrets,
  )
}

output "agent_policy_arn" {
  description = "IAM policy to attach to the agents' role; null on a store other than AWS."
  value       = module.s3.agent_policy_arn
}

output "namespace" {
  description = "Namespace of scaler and agents."
  value       = module.kubernetes.namespace
}
