"""Every customer has an email address, and no two the same one."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.alter_column("customer", "email", nullable=False)
    op.create_unique_constraint("customer_email_key", "customer", ["email"])
