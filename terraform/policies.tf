data "aws_partition" "current" {}

data "aws_region" "current" {}

locals {
  kms         = var.encryption != "s3"
  kms_key_arn = var.encryption == "created-key" ? aws_kms_key.store[0].arn : var.encryption == "given-key" ? var.kms_key_arn : ""

  roles = toset(["archiver", "maintainer", "brancher", "reader", "drill"])

  # What the templates may name. The project's tests render the same files.
  rendering = {
    bucket_arn  = aws_s3_bucket.store.arn
    below       = var.prefix == "" ? "" : "${var.prefix}/"
    kms_key_arn = local.kms_key_arn
    kms_via     = "s3.${data.aws_region.current.region}.${data.aws_partition.current.dns_suffix}"
    create_only = var.enforce_create_only
  }

  # Decoded and encoded again: what is no JSON fails in the plan, and blanks do not count against IAM's limits.
  policies = {
    for role in local.roles :
    role => jsonencode(jsondecode(templatefile("${path.module}/policies/${role}.json.tftpl", local.rendering)))
  }
  bucket_policy = jsonencode(jsondecode(templatefile("${path.module}/policies/bucket.json.tftpl", local.rendering)))
}
