"""Every customer has an email address, and no two the same one; those that do not are put right first."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("update customer set email = 'unknown-' || id || '@invalid' where email is null")
    op.execute(
        "update customer later set email = later.id || '+' || later.email from customer first"
        " where first.email = later.email and first.id < later.id"
    )
    op.alter_column("customer", "email", nullable=False)
    op.create_unique_constraint("customer_email_key", "customer", ["email"])
