#!/usr/bin/env bash
# Lens-Mini-Turbo on one CPU core: sweep, distil, export, score. What is done is skipped; again to resume.
#
#     bash train/runs/mini_turbo.sh                     # all of it
#     bash train/runs/mini_turbo.sh distil export       # some of it
#
# INIT (lens/mini/base; best the weights of RL), RUN (runs/turbo), LIMIT (30m of a stage), PYTHON (python3) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
INIT=${INIT:-lens/mini/base} RUN=${RUN:-runs/turbo} LIMIT=${LIMIT:-30m} PY=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
train() { "$PY" -m train distill --config mini --init "$INIT" --out "$RUN" "$@"; }

for stage in "${@:-sweep distil export score}"; do
  for one in $stage; do
    case $one in
      sweep) [ -f "$RUN/sweep.md" ] || train --sweep --stop-after "$LIMIT" ;; # write its best pair into train/configs/mini/distill.py
      distil) train --stop-after "$LIMIT" ;;
      export) train --export "$RUN/mini-turbo" ;;
      score) # the bars: the student in four steps, its teacher in four and in twenty
        "$PY" -m train evaluate mini-bench --model "$RUN/mini-turbo" --steps 4 --guidance 1 --out "$RUN/score_student"
        "$PY" -m train evaluate mini-bench --model "$INIT" --steps 4 --guidance 3 --ceilings none --out "$RUN/score_teacher_4"
        "$PY" -m train evaluate mini-bench --model "$INIT" --steps 20 --guidance 3 --ceilings none --out "$RUN/score_teacher_20"
        ;;
      *) echo "mini_turbo.sh: no stage $one; sweep distil export score" >&2; exit 2 ;;
    esac
  done
done
