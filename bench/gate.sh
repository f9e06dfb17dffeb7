#!/usr/bin/env bash
# Compare new results with the committed ones of the same device:  bash bench/gate.sh DIR SUITE...
# Exits 1 where something became slower, 2 where the two machines are unlike. A suite without a committed result passes
# and is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
new=$1
shift
worst=0
for suite in "$@"; do
  after="$new/$suite.json"
  if [ ! -f "$after" ]; then
    echo "$suite: not measured"
    worst=$((worst > 1 ? worst : 1))
    continue
  fi
  folder=$("$PY" -c 'import json, sys
from bench.machine import folder_name
print(folder_name(json.load(open(sys.argv[1]))["machine_info"]["identity"]))' "$after")
  before="bench/results/$folder/$suite.json"
  if [ ! -f "$before" ]; then
    echo "$suite: no committed result in bench/results/$folder, nothing to compare with"
    continue
  fi
  echo "== $suite"
  code=0
  "$PY" -m bench compare "$before" "$after" || code=$?
  worst=$((code > worst ? code : worst))
done
exit "$worst"
