# terraform test: what the module plans, and which inputs it refuses. No store.

mock_provider "aws" {}

variables {
  bucket = "thaw-checkpoints"
}

run "on_aws" {
  command = plan

  variables {
    policy_name = "thaw-agent"
  }

  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.this[0].block_public_acls,
      aws_s3_bucket_public_access_block.this[0].block_public_policy,
      aws_s3_bucket_public_access_block.this[0].ignore_public_acls,
      aws_s3_bucket_public_access_block.this[0].restrict_public_buckets,
    ])
    error_message = "private"
  }
  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this[0].rule).apply_server_side_encryption_by_default).sse_algorithm == "AES256"
    error_message = "encrypted"
  }
  assert {
    condition     = aws_s3_bucket_versioning.this[0].versioning_configuration[0].status == "Enabled"
    error_message = "versioned"
  }
  assert {
    condition     = aws_s3_bucket_lifecycle_configuration.this[0].rule[0].noncurrent_version_expiration[0].noncurrent_days == 7
    error_message = "old versions go"
  }
  assert {
    condition     = !aws_s3_bucket.this.force_destroy
    error_message = "a bucket with checkpoints stays"
  }
  assert {
    condition     = [for one in jsondecode(aws_s3_bucket_policy.this[0].policy).Statement : one.Sid] == ["TlsOnly"]
    error_message = "the bucket's own policy only refuses what is not encrypted on the way"
  }
  assert {
    condition = toset(flatten([for one in jsondecode(aws_iam_policy.agent[0].policy).Statement : one.Action])) == toset([
      "s3:DeleteObject", "s3:GetObject", "s3:ListBucket", "s3:PutObject",
    ])
    error_message = "agents: objects and the list, nothing else"
  }
  assert {
    condition     = alltrue([for one in jsondecode(aws_iam_policy.agent[0].policy).Statement : alltrue([for arn in one.Resource : startswith(arn, "arn:aws:s3:::thaw-checkpoints")])])
    error_message = "this bucket only"
  }
}

run "of_some_functions" {
  command = plan

  variables {
    functions = ["search", "index"]
  }

  assert {
    condition     = jsondecode(output.agent_policy).Statement[0].Resource == ["arn:aws:s3:::thaw-checkpoints/functions/index/*", "arn:aws:s3:::thaw-checkpoints/functions/search/*"]
    error_message = "their objects only"
  }
}

run "refuses_functions_that_are_patterns" {
  command = plan
  variables {
    functions = ["*"]
  }
  expect_failures = [var.functions]
}

run "with_a_key" {
  command = plan

  variables {
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/11111111-2222-3333-4444-555555555555"
  }

  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this[0].rule).apply_server_side_encryption_by_default).sse_algorithm == "aws:kms"
    error_message = "encrypted with the key"
  }
  assert {
    condition     = contains(flatten([for one in jsondecode(output.agent_policy).Statement : one.Resource]), var.kms_key_arn)
    error_message = "agents may use the key"
  }
}

run "on_a_compatible_store" {
  command = plan

  variables {
    compatible_store = true
    endpoint_url     = "http://127.0.0.1:9000"
    agent_principals = ["agent"]
    policy_name      = "ignored"
  }

  assert {
    condition = 0 == length(concat(
      aws_s3_bucket_public_access_block.this, aws_s3_bucket_ownership_controls.this, aws_s3_bucket_server_side_encryption_configuration.this,
      aws_s3_bucket_lifecycle_configuration.this, aws_iam_policy.agent,
    ))
    error_message = "nothing that only AWS has"
  }
  assert {
    condition     = [for one in jsondecode(aws_s3_bucket_policy.this[0].policy).Statement : one.Principal.AWS] == [["agent"], ["agent"]]
    error_message = "the agent, and nobody else"
  }
  assert {
    condition     = output.settings.s3 == { bucket = "thaw-checkpoints", region = "us-east-1", endpoint_url = "http://127.0.0.1:9000" }
    error_message = "settings follow the bucket"
  }
}

run "refuses_names_that_s3_refuses" {
  command = plan
  variables {
    bucket = "Thaw.Checkpoints"
  }
  expect_failures = [var.bucket]
}

run "refuses_an_endpoint_with_a_path" {
  command = plan
  variables {
    endpoint_url = "http://127.0.0.1:9000/bucket"
  }
  expect_failures = [var.endpoint_url]
}

run "refuses_a_key_that_is_none" {
  command = plan
  variables {
    kms_key_arn = "my-key"
  }
  expect_failures = [var.kms_key_arn]
}

run "refuses_no_days" {
  command = plan
  variables {
    noncurrent_days = 0
  }
  expect_failures = [var.noncurrent_days]
}
