# One cluster, archived and maintained by EC2 instances, read from laptops.

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

data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

module "store" {
  source = "../.."

  bucket = "example-postgres-history"
  prefix = "prod"
  name   = "tl-prod"

  role_trust_policies = {
    archiver   = data.aws_iam_policy_document.ec2.json
    maintainer = data.aws_iam_policy_document.ec2.json
  }
  users = ["brancher"]
}

output "store" {
  description = "What tl init takes."
  value       = module.store.store
}
