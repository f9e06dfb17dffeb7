#!/bin/sh
# Lens-Mini-RL from the shipped Mini-Base on one CPU core: prompts, the run, its checkpoint, its score beside the base's.
#   sh train/runs/mini_rl.sh [OUT] [RECIPE FIELDS, e.g. KL_WEIGHT=1.0 SEED=12]
# The same command again goes on where it stopped.
set -eu
out=${1:-runs/mini_rl}
[ $# -gt 0 ] && shift
changes=""
for field in "$@"; do changes="$changes --set $field"; done

mkdir -p "$out"
[ -f "$out/prompts.jsonl" ] || python -m train rl_prompts --world mini --count 600 --out "$out/prompts.jsonl"
# shellcheck disable=SC2086  # one word per option
python -m train rl --config mini --prompts "$out/prompts.jsonl" --out "$out" $changes
python -m train rl --config mini --out "$out" $changes --export "$out/export"
for guidance in 1 3; do
    for model in mini "$out/export"; do
        name=$([ "$model" = mini ] && echo base || echo rl)
        python -m train evaluate mini-bench --model "$model" --guidance "$guidance" --ceilings none \
            --tasks single_object two_object counting colors position color_attr --out "$out/${name}_g$guidance"
    done
done
