#!/usr/bin/env bash
# Creates, resets or deletes the branch of a pull request; says how to reach it and how old its data is.
set -euo pipefail

fail() {
  # A message is one line to the runner.
  printf '::error title=tl branch::%s\n' "$(printf '%s' "$1" | sed -e 's/%/%25/g' | awk 'NR > 1 { printf "%%0A" } { printf "%s", $0 }')"
  exit "${2:-1}"
}

# The member of the JSON object on stdin; nothing for a member that is null or not there.
member() {
  python3 -c 'import json, sys; value = json.load(sys.stdin).get(sys.argv[1]); print("" if value is None else value)' "$1"
}

name=${ACTION_NAME:-}
if [ -z "$name" ]; then
  [ -n "${ACTION_PULL_REQUEST:-}" ] || fail "this run belongs to no pull request: give the input 'name'" 2
  name="pr-$ACTION_PULL_REQUEST"
fi

case "$ACTION_COMMAND" in
  create) exists=reuse ;;
  reset) exists=reset ;;
  delete)
    # It may have expired; then there is nothing left to do.
    listed=$(tl branches --json) || fail "tl cannot list the branches of this host" $?
    if NAME=$name python3 -c 'import json, os, sys; sys.exit(os.environ["NAME"] not in [each["name"] for each in json.load(sys.stdin)])' <<<"$listed"; then
      tl delete "$name" --yes --json >/dev/null || fail "branch $name could not be deleted" $?
      said="Branch \`$name\` is deleted."
    else
      said="There is no branch \`$name\` any more."
    fi
    echo "name=$name" >>"$GITHUB_OUTPUT"
    echo "$said" | tee -a "$GITHUB_STEP_SUMMARY"
    exit 0
    ;;
  *) fail "no command '$ACTION_COMMAND': create, reset or delete" 2 ;;
esac

arguments=("$name" --json --if-exists "$exists")
[ -z "${ACTION_STORE:-}" ] || arguments+=(--store "$ACTION_STORE")
[ -z "${ACTION_ENDPOINT_URL:-}" ] || arguments+=(--endpoint-url "$ACTION_ENDPOINT_URL")
[ -z "${ACTION_AT:-}" ] || arguments+=(--at "$ACTION_AT")
[ -z "${ACTION_TTL:-}" ] || arguments+=(--ttl "$ACTION_TTL")
while IFS= read -r script; do
  # What lies around a path in YAML is no part of it.
  script="${script#"${script%%[![:space:]]*}"}"
  script="${script%"${script##*[![:space:]]}"}"
  [ -z "$script" ] || arguments+=(--run "$script")
done <<<"${ACTION_RUN:-}"

code=0
told=$(tl branch "${arguments[@]}") || code=$?
if [ "$code" -ne 0 ]; then
  fail "$(member error <<<"$told" 2>/dev/null || echo "tl branch ended with $code")" "$code"
fi

dsn=$(member dsn <<<"$told")
moment=$(member time <<<"$told")
lsn=$(member lsn <<<"$told")
age=""
if [ -n "$moment" ]; then
  age=$(python3 -c 'import sys; from datetime import datetime, timezone
then = datetime.fromisoformat(sys.argv[1].replace("Z", "+00:00"))
print(max(0, int((datetime.now(timezone.utc) - then).total_seconds())))' "$moment")
fi
{
  echo "name=$name"
  echo "dsn=$dsn"
  echo "age-seconds=$age"
} >>"$GITHUB_OUTPUT"
{
  echo "### Branch \`$name\`"
  echo
  echo "| | |"
  echo "| --- | --- |"
  echo "| connect | \`psql '$dsn'\` |"
  echo "| data of | ${moment:-unknown} (${age:-?} s old), $lsn |"
} >>"$GITHUB_STEP_SUMMARY"
echo "branch $name: $dsn"
echo "its data is of ${moment:-an unknown time}, ${age:-?} s old"
