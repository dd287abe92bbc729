variable "bucket" {
  description = "Name of the bucket to create. It should hold stores of tl and nothing else."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens, and begins and ends with a letter or digit."
  }
}

variable "prefix" {
  description = "Prefix of the store inside the bucket, without slashes at its ends: s3://bucket/prefix is the store. Empty: the whole bucket."
  type        = string
  default     = ""

  validation {
    condition     = var.prefix == "" || can(regex("^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", var.prefix))
    error_message = "The prefix consists of letters, digits, dots, underscores and hyphens, in segments separated by single slashes."
  }
}

variable "encryption" {
  description = "How objects are encrypted at rest: s3 (by S3's own keys), created-key (a KMS key that is created here) or given-key (the KMS key kms_key_arn)."
  type        = string
  default     = "s3"

  validation {
    condition     = contains(["s3", "created-key", "given-key"], var.encryption)
    error_message = "Encryption is s3, created-key or given-key."
  }
}

variable "kms_key_arn" {
  description = "ARN of the KMS key for given-key, in the region of the bucket. The key's own policy must let IAM policies of this account grant its use."
  type        = string
  default     = null

  validation {
    condition     = (var.encryption == "given-key") == (var.kms_key_arn != null)
    error_message = "A KMS key is given if encryption is given-key, and only then."
  }

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/.+$", var.kms_key_arn))
    error_message = "The KMS key is named by the ARN of a key (arn:aws:kms:REGION:ACCOUNT:key/ID), not of an alias: policies do not follow aliases."
  }
}

variable "kms_deletion_window_days" {
  description = "Days between the destruction of a key that was created here and its end, with which the whole store becomes unreadable."
  type        = number
  default     = 30

  validation {
    condition     = var.kms_deletion_window_days >= 7 && var.kms_deletion_window_days <= 30
    error_message = "KMS takes 7 to 30 days."
  }
}

variable "versioning" {
  description = "Whether the bucket keeps what is deleted, for noncurrent_days. Nothing in a store is ever overwritten, so versions cost nothing but garbage that stays longer."
  type        = bool
  default     = true
}

variable "noncurrent_days" {
  description = "With versioning: days after which deleted objects are gone for good."
  type        = number
  default     = 30

  validation {
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "A whole number of days, at least 1."
  }
}

variable "abort_multipart_days" {
  description = "Days after which uploads in parts that were never completed are removed. The store makes none; other tools may."
  type        = number
  default     = 7

  validation {
    condition     = var.abort_multipart_days >= 1 && floor(var.abort_multipart_days) == var.abort_multipart_days
    error_message = "A whole number of days, at least 1."
  }
}

variable "object_lock" {
  description = "Whether objects are locked against deletion for object_lock_days after their creation. Holds for everything in the bucket, marks, pins, branch logs and evidence of drills included."
  type        = bool
  default     = false

  validation {
    condition     = !var.object_lock || var.versioning
    error_message = "Object Lock needs versioning = true."
  }
}

variable "object_lock_mode" {
  description = "GOVERNANCE (who has s3:BypassGovernanceRetention may still delete; no role of this module has it) or COMPLIANCE (nobody can, the account's root included)."
  type        = string
  default     = "GOVERNANCE"

  validation {
    condition     = contains(["GOVERNANCE", "COMPLIANCE"], var.object_lock_mode)
    error_message = "The mode is GOVERNANCE or COMPLIANCE."
  }
}

variable "object_lock_days" {
  description = "Days for which Object Lock holds each object after its creation."
  type        = number
  default     = 30

  validation {
    condition     = var.object_lock_days >= 1 && floor(var.object_lock_days) == var.object_lock_days
    error_message = "A whole number of days, at least 1."
  }
}

variable "enforce_create_only" {
  description = "Whether the bucket itself refuses every PutObject below the prefix that does not carry If-None-Match, whoever sends it. Keeps copies and uploads in parts out, too."
  type        = bool
  default     = true
}

variable "name" {
  description = "Beginning of the names of policies, roles and users: NAME-archiver and so on."
  type        = string
  default     = "tl"

  validation {
    condition     = can(regex("^[A-Za-z0-9_.-]{1,48}$", var.name))
    error_message = "1 to 48 letters, digits, underscores, dots and hyphens."
  }
}

variable "role_trust_policies" {
  description = "Roles to create: a trust policy in JSON for each of archiver, maintainer, brancher, reader and drill that shall have one."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(setsubtract(keys(var.role_trust_policies), ["archiver", "maintainer", "brancher", "reader", "drill"])) == 0
    error_message = "The roles are archiver, maintainer, brancher, reader and drill."
  }

  validation {
    condition     = alltrue([for policy in values(var.role_trust_policies) : can(jsondecode(policy))])
    error_message = "Trust policies are JSON."
  }
}

variable "users" {
  description = "Those of archiver, maintainer, brancher, reader and drill for which an IAM user is created, for hosts outside AWS. Access keys are not created: they would be in Terraform's state."
  type        = set(string)
  default     = []

  validation {
    condition     = length(setsubtract(var.users, ["archiver", "maintainer", "brancher", "reader", "drill"])) == 0
    error_message = "The users are archiver, maintainer, brancher, reader and drill."
  }
}

variable "tags" {
  description = "Tags of everything that is created here."
  type        = map(string)
  default     = {}
}
