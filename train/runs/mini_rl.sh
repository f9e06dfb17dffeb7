#!/bin/sh
# Lens-Mini-RL from the shipped Mini-Base on one CPU core: prompts, the hardest of them, the run, its best checkpoint, scores beside
# the base's, the gain.
#   sh train/runs/mini_rl.sh [OUT] [RECIPE FIELDS, e.g. KL_WEIGHT=1.0 SEED=12]
# The same command again goes on where it stopped. May be set: INIT (mini-base), HARDEST (150 of 600 prompts), LIMIT (the time of
# one call of the run, such as 9m), PER_TASK (40 pictures), SIZES (64x64 128x128), STEPS of sampling (8 20), PYTHON (python), SHIP (a folder, such as
# lens/mini/rl, that then gets the adapter with its recipe, log and scores).
set -eu
out=${1:-runs/mini_rl}
[ $# -gt 0 ] && shift
changes=""
for field in "$@"; do changes="$changes --set $field"; done
init=${INIT:-mini-base}
python=${PYTHON:-python}

mkdir -p "$out"
[ -f "$out/prompts.jsonl" ] || "$python" -m train rl_prompts --world mini --count 600 --out "$out/prompts.jsonl"
# shellcheck disable=SC2086  # one word per option
[ -f "$out/hardest.jsonl" ] || "$python" -m train rl --config mini --init "$init" --prompts "$out/prompts.jsonl" --out "$out" \
    $changes --hardest "${HARDEST:-150}" --set GROUP=4
# shellcheck disable=SC2086
"$python" -m train rl --config mini --init "$init" --prompts "$out/hardest.jsonl" --out "$out" ${LIMIT:+--stop-after "$LIMIT"} $changes
# shellcheck disable=SC2086
"$python" -m train rl --config mini --init "$init" --out "$out" $changes --state best --export "$out/export"
for steps in ${STEPS:-8 20}; do
    for model in "$init" "$out/export/lora"; do
        name=$([ "$model" = "$init" ] && echo base || echo rl)
        # shellcheck disable=SC2086
        "$python" -m train evaluate mini-bench --model "$model" --guidance 1 3 --steps "$steps" --ceilings none \
            --per-task "${PER_TASK:-40}" --sizes ${SIZES:-64x64 128x128} --tasks single_object two_object counting colors \
            position color_attr --out "$out/${name}_${steps}"
    done
    "$python" -m train evaluate rl-gain --base "$out/base_$steps/scores.json" --rl "$out/rl_$steps/scores.json" \
        --out "$out/gain_$steps.json"
done
if [ -n "${SHIP:-}" ]; then
    mkdir -p "$SHIP"
    for file in adapter_model.safetensors adapter_config.json model_index.json recipe.json rl.jsonl; do
        cp "$out/export/lora/$file" "$SHIP/"
    done
    cp "$out/gain_20.json" "$SHIP/scores.json"
fi
