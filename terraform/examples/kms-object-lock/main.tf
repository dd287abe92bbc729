# A store that nobody can delete from for ninety days, encrypted with a key of its own.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.0"
    }
  }
}

provider "aws" {
  region = "eu-central-1"
}

module "store" {
  source = "../.."

  bucket     = "example-postgres-worm"
  encryption = "created-key"

  versioning       = true
  noncurrent_days  = 90
  object_lock      = true
  object_lock_mode = "COMPLIANCE"
  object_lock_days = 90

  users = ["archiver", "drill", "reader"]
  tags  = { purpose = "database history" }
}

output "store" {
  description = "What tl init takes."
  value       = module.store.store
}

output "policies" {
  description = "Policy documents, for principals that are managed elsewhere."
  value       = module.store.policies
}
