resource "aws_iam_policy" "role" {
  for_each = local.roles

  name        = "${var.name}-${each.key}"
  description = "What the ${each.key} of s3://${var.bucket}/${var.prefix} needs, and nothing else"
  policy      = local.policies[each.key]
  tags        = var.tags
}

resource "aws_iam_role" "role" {
  for_each = var.role_trust_policies

  name               = "${var.name}-${each.key}"
  assume_role_policy = each.value
  tags               = var.tags
}

resource "aws_iam_role_policy_attachment" "role" {
  for_each = var.role_trust_policies

  role       = aws_iam_role.role[each.key].name
  policy_arn = aws_iam_policy.role[each.key].arn
}

resource "aws_iam_user" "role" {
  for_each = var.users

  name = "${var.name}-${each.key}"
  tags = var.tags
}

resource "aws_iam_user_policy_attachment" "role" {
  for_each = var.users

  user       = aws_iam_user.role[each.key].name
  policy_arn = aws_iam_policy.role[each.key].arn
}
