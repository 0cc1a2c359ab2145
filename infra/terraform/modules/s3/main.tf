# The bucket of checkpoints: private, encrypted, versioned, cleaned up, and open to agents for what they do and nothing else.

locals {
  bucket_arn = "arn:${local.partition}:s3:::${var.bucket}"
  partition  = startswith(var.region, "cn-") ? "aws-cn" : startswith(var.region, "us-gov-") ? "aws-us-gov" : "aws"

  # agent/store/manifest.py: everything of a function is below functions/<function>/.
  object_arns = [for function in coalescelist(sort(var.functions), ["*"]) : "${local.bucket_arn}/functions/${function}/*"]
  aws         = var.compatible_store ? 0 : 1

  # On AWS a HEAD or GET of an object that is not there says so only to those who may list the bucket.
  agent_statements = [
    { Sid = "AgentObjects", Effect = "Allow", Action = ["s3:DeleteObject", "s3:GetObject", "s3:PutObject"], Resource = local.object_arns },
    { Sid = "AgentList", Effect = "Allow", Action = ["s3:ListBucket"], Resource = [local.bucket_arn] },
  ]
  key_statements = [
    for arn in compact([var.kms_key_arn]) :
    { Sid = "AgentKey", Effect = "Allow", Action = ["kms:Decrypt", "kms:GenerateDataKey"], Resource = [arn] }
  ]
  granted = [
    for statement in local.agent_statements : merge(statement, { Principal = { AWS = sort(var.agent_principals) } })
    if length(var.agent_principals) > 0
  ]
  refused = [
    {
      Sid       = "TlsOnly"
      Effect    = "Deny"
      Action    = ["s3:*"]
      Resource  = [local.bucket_arn, "${local.bucket_arn}/*"]
      Principal = { AWS = ["*"] }
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }
  ]
  bucket_statements = concat(local.granted, [for statement in local.refused : statement if !var.compatible_store])
}

resource "aws_s3_bucket" "this" {
  bucket        = var.bucket
  force_destroy = var.force_destroy
  tags          = var.tags
}

resource "aws_s3_bucket_versioning" "this" {
  count  = var.versioning ? 1 : 0
  bucket = aws_s3_bucket.this.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_policy" "this" {
  count  = length(local.bucket_statements) > 0 ? 1 : 0
  bucket = aws_s3_bucket.this.id
  policy = jsonencode({ Version = "2012-10-17", Statement = local.bucket_statements })

  # A policy that came first could make AWS refuse the block.
  depends_on = [aws_s3_bucket_public_access_block.this]
}

resource "aws_s3_bucket_public_access_block" "this" {
  count                   = local.aws
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  count  = local.aws
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  count  = local.aws
  bucket = aws_s3_bucket.this.id

  rule {
    # One data key for many objects instead of a request to KMS for each.
    bucket_key_enabled = var.kms_key_arn != ""

    apply_server_side_encryption_by_default {
      sse_algorithm     = var.kms_key_arn == "" ? "AES256" : "aws:kms"
      kms_master_key_id = var.kms_key_arn == "" ? null : var.kms_key_arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  count  = local.aws
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "noncurrent"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }

  # Versions must be on before their expiry is configured.
  depends_on = [aws_s3_bucket_versioning.this]
}

resource "aws_iam_policy" "agent" {
  count       = var.policy_name == "" ? 0 : local.aws
  name        = var.policy_name
  description = "Thaw agents: the objects of checkpoints in ${var.bucket}"
  policy      = jsonencode({ Version = "2012-10-17", Statement = concat(local.agent_statements, local.key_statements) })
  tags        = var.tags
}
