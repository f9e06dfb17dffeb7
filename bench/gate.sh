#!/usr/bin/env bash
# Compare new results with the committed ones of the same device:  bash bench/gate.sh DIR SUITE...
# Exits 1 where something became slower or was not measured, 2 where the two machines are unlike, 3 where no suite could be
# judged: none has a committed result, or all are inconclusive. A suite that could not be judged beside others is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
new=$1
shift
worst=0 judged=0
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
  if [ "$code" = 3 ]; then
    continue
  fi
  judged=$((judged + 1))
  worst=$((code > worst ? code : worst))
done
if [ "$worst" = 0 ] && [ "$judged" = 0 ]; then
  echo "nothing was judged: commit these results in bench/results to compare the next ones with them"
  worst=3
fi
exit "$worst"
