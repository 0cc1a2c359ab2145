output "bucket" {
  description = "Name of the bucket."
  value       = aws_s3_bucket.this.id
}

output "bucket_arn" {
  description = "ARN of the bucket."
  value       = aws_s3_bucket.this.arn
}

output "agent_policy" {
  description = "The least that agents need, as the text of an IAM policy."
  value       = jsonencode({ Version = "2012-10-17", Statement = concat(local.agent_statements, local.key_statements) })
}

output "agent_policy_arn" {
  description = "ARN of the IAM policy for agents; null when none was made."
  value       = one(aws_iam_policy.agent[*].arn)
}

output "settings" {
  description = "Thaw's settings that follow from the bucket: section to field to value, for the settings file or THAW_<SECTION>_<FIELD>."
  value = {
    s3 = {
      bucket       = var.bucket
      region       = var.region
      endpoint_url = var.endpoint_url
    }
  }
}
