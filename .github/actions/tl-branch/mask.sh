#!/usr/bin/env bash
# Tells the runner which values of the environment must never show in a log.
set -euo pipefail
for name in AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN PGPASSWORD; do
  if [ -n "${!name:-}" ]; then
    printf '::add-mask::%s\n' "${!name}"
  fi
done
