# Its policy is KMS's default: IAM policies of this account decide who may use it.
resource "aws_kms_key" "store" {
  count = var.encryption == "created-key" ? 1 : 0

  description             = "Objects of s3://${var.bucket}"
  deletion_window_in_days = var.kms_deletion_window_days
  enable_key_rotation     = true
  tags                    = var.tags
}
