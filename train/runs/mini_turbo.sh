#!/usr/bin/env bash
# Lens-Mini-Turbo on one CPU core: sweep, ablation, distil, export, scores and bars. What is done is skipped; again to resume.
#
#     bash train/runs/mini_turbo.sh                     # distil, export, score and bars: what lens/mini/turbo was made by
#     bash train/runs/mini_turbo.sh sweep ablate        # the tables first
#
# INIT (mini-rl), GUIDANCE of the teacher (2.0; of mini-base 3.0), RUN (runs/turbo), LORA (r=32,alpha=64,targets=all; "" trains every
# weight), STEPS of the student after the guided ones (1), FIELDS of the recipe (of distil and export FAKE_WARMUP=0
# GUIDED_STEPS=1000 SCENES=4096; COMPUTE=bfloat16 is faster on a CPU with bfloat16 units, elsewhere far slower), LIMIT (30m of a stage,
# a whole table being one), SIZES (128x128), COUNT (2000 pictures of the bars) and PYTHON (python3) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
INIT=${INIT:-mini-rl} GUIDANCE=${GUIDANCE:-2.0} RUN=${RUN:-runs/turbo} LORA=${LORA-r=32,alpha=64,targets=all} LIMIT=${LIMIT:-30m} PY=${PYTHON:-python3}
SIZES=${SIZES:-128x128} COUNT=${COUNT:-2000} STEPS=${STEPS:-1}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
made=${FIELDS-FAKE_WARMUP=0 GUIDED_STEPS=1000 SCENES=4096}
train() { # fields, options
  local changes=() field
  for field in "GUIDANCE=$GUIDANCE" "TEACHER_GUIDANCE=$GUIDANCE" $1; do changes+=(--set "$field"); done
  [ -z "$LORA" ] || changes+=(--lora "$LORA")
  "$PY" -m train distill --config mini --init "$INIT" --out "$RUN" "${changes[@]}" "${@:2}"
}
bench() { "$PY" -m train evaluate mini-bench --ceilings none --sizes $SIZES "$@"; }

for stage in "${@:-distil export score bars}"; do
  for one in $stage; do
    case $one in
      sweep) [ -f "$RUN/sweep.md" ] || train "${FIELDS-}" --sweep --stop-after "$LIMIT" ;; # write its best pair into train/configs/mini/distill.py
      ablate) [ -f "$RUN/ablation.md" ] || train "${FIELDS-}" --ablate --stop-after "$LIMIT" ;;
      distil) train "$made" --steps "$STEPS" --stop-after "$LIMIT" ;;
      export) train "$made" --export "$RUN/mini-turbo" ;;
      score) # the student at its own steps and at others, its teacher in four and in twenty
        for steps in 4 2 3 6 8; do
          bench --model "$RUN/mini-turbo" --steps $steps --guidance 1 --out "$RUN/score_student_$steps"
        done
        for steps in 4 20; do
          bench --model "$INIT" --steps $steps --guidance "$GUIDANCE" --out "$RUN/score_teacher_$steps"
        done
        ;;
      bars)
        for size in $SIZES; do
          "$PY" -m train evaluate student --model "$RUN/mini-turbo" --teacher "$INIT" --size "$size" --count "$COUNT" \
            --guidance "$GUIDANCE" --out "$RUN/bars_$size"
        done
        ;;
      *) echo "mini_turbo.sh: no stage $one; sweep ablate distil export score bars" >&2; exit 2 ;;
    esac
  done
done
