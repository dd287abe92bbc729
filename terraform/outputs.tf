output "store" {
  description = "URL of the store, for tl init and TL_STORE."
  value       = "s3://${aws_s3_bucket.store.id}${var.prefix == "" ? "" : "/${var.prefix}"}"
}

output "bucket_arn" {
  description = "ARN of the bucket."
  value       = aws_s3_bucket.store.arn
}

output "kms_key_arn" {
  description = "ARN of the KMS key; null without one."
  value       = local.kms ? local.kms_key_arn : null
}

output "policies" {
  description = "The policy document of each role, in JSON, to attach to principals of your own."
  value       = local.policies
}

output "policy_arns" {
  description = "ARN of the managed policy of each role."
  value       = { for role, policy in aws_iam_policy.role : role => policy.arn }
}

output "role_arns" {
  description = "ARNs of the roles that were created, by role."
  value       = { for role, made in aws_iam_role.role : role => made.arn }
}

output "user_names" {
  description = "Names of the users that were created, by role. Make their access keys by hand."
  value       = { for role, made in aws_iam_user.role : role => made.name }
}
