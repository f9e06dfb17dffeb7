#!/usr/bin/env bash
# Lens-Mini on one GPU, from nothing to weights. In order: check [build] vae encoder pretrain export mixed export score pack
#
#     bash train/runs/mini_gpu.sh check vae encoder          # any number of stages in one call; what is done is skipped
#     bash train/runs/mini_gpu.sh pretrain                   # saves and returns after LIMIT; again to resume
#     bash train/runs/mini_gpu.sh export mixed export        # many sizes, from what the first stage exported
#     bash train/runs/mini_gpu.sh export pack                # $RUN/home holds what to take along: files of 15 MB at most
#     bash train/runs/mini_gpu.sh unpack FOLDER              # at home, or on the next machine: the reverse of pack
#
# RUN (runs/gpu), PYTHON (python3), DEVICE (cuda), WORKERS (cores - 2), LIMIT (9m), RECIPE (mini_gpu) may be set, and
# PRETRAIN and MIXED for further options of those stages: PRETRAIN='--init runs/gpu/mini --joint-steps 0 --steps 3000'
# goes on from exported weights where the state of an earlier machine is gone.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-runs/gpu} PY=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-9m} RECIPE=${RECIPE:-mini_gpu}
WORKERS=${WORKERS:-$(( $(nproc) > 3 ? $(nproc) - 2 : 1 ))}
MOST=15000000 # bytes of a file that is taken along
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$RUN"

finished() { # FILE STAGE EXPRESSION of state and config, which says whether nothing is left to do
  [ -f "$1" ] && "$PY" - "$1" "$2" "$3" "$RECIPE" <<'PYTHON'
import sys
from pathlib import Path
from train import configs
from train.loop.checkpoints import load_state

path, stage, expression, recipe = sys.argv[1:]
state, config = load_state(Path(path), stage), configs.load(recipe, stage.split()[0])
sys.exit(not eval(expression))
PYTHON
}

compact() { # FROM TO STAGE: the state without what only a resumed training needs
  "$PY" - "$@" <<'PYTHON'
import sys
from pathlib import Path
from train.loop.checkpoints import load_state, save_state

source, target, stage = sys.argv[1:]
state = load_state(Path(source), stage)
save_state(Path(target), {k: v for k, v in state.items() if k not in ("format", "model", "optimizer")})
PYTHON
}

check() {
  "$PY" - <<'PYTHON'
import importlib
import torch

for name in ("safetensors", "tokenizers", "transformers", "diffusers", "PIL", "jinja2"):
    print(name, importlib.import_module(name).__version__)
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "without a usable GPU")
from lens.doctor.ops import report

for op, chosen, reason in report():
    print(f"{op:32} {chosen:10} {reason}")
PYTHON
}

build() { # optional: the row kernels for this GPU; without them the same operations run in plain PyTorch
  LENS_CUDA=ON "$PY" setup.py --quiet build_ext --inplace
}

vae() {
  finished "$RUN/vae/joint.pt" "vae joint" 'state["mean"] is not None' && return
  "$PY" -m train vae --config "$RECIPE" --out "$RUN/vae" --part joint --device "$DEVICE" --compile --stop-after "$LIMIT"
}

encoder() {
  finished "$RUN/encoder/encoder.pt" encoder 'state["step"] >= config.TRAIN["steps"]' && return
  "$PY" -m train encoder --config "$RECIPE" --out "$RUN/encoder" --device "$DEVICE" --workers "$WORKERS" --stop-after "$LIMIT"
}

pretrain() {
  local start=(--encoder "$RUN/encoder/encoder.pt")
  case "${PRETRAIN:-}" in *--init*) start=() ;; esac # its own encoder comes with it
  # shellcheck disable=SC2086
  "$PY" -m train pretrain --config "$RECIPE" --vae "$RUN/vae" "${start[@]}" --out "$RUN/base" \
    --device "$DEVICE" --workers "$WORKERS" --stop-after "$LIMIT" ${PRETRAIN:-}
}

mixed() {
  # shellcheck disable=SC2086
  "$PY" -m train mixed_resolution --config "$RECIPE" --init "$RUN/mini" --vae "$RUN/mini/vae" --out "$RUN/mixed" \
    --device "$DEVICE" --workers "$WORKERS" --stop-after "$LIMIT" ${MIXED:-}
}

export_() { # the last stage that was trained
  if [ -f "$RUN/mixed/mixed_resolution.pt" ]; then
    "$PY" -m train mixed_resolution --config "$RECIPE" --vae "$RUN/mini/vae" --out "$RUN/mixed" --export "$RUN/mini"
  else
    "$PY" -m train pretrain --config "$RECIPE" --vae "$RUN/vae" --out "$RUN/base" --export "$RUN/mini"
  fi
}

score() {
  "$PY" -m train evaluate mini-bench --model "$RUN/mini" --classes all --out "$RUN/scores" --threads "$(nproc)"
}

pack() {
  local home=$RUN/home
  rm -rf "$home" && mkdir -p "$home"
  tar -C "$RUN" -cf "$home/transformer.tar" mini/transformer
  tar -C "$RUN" --exclude=mini/transformer -cf "$home/rest.tar" mini
  compact "$RUN/vae/joint.pt" "$home/joint.pt" "vae joint"
  (cd "$RUN" && find . \( -path ./mini -o -path ./home \) -prune -o -type f \
    \( -name 'log.jsonl' -o -name '*.json' -o -name '*.png' \) -print | sort | tar -czf home/record.tar.gz -T -)
  ls -l "$home"
  local large
  large=$(find "$home" -type f -size "+${MOST}c")
  if [ -n "$large" ]; then
    echo "mini_gpu.sh pack: larger than $MOST bytes: $large" >&2
    return 1
  fi
}

unpack() {
  tar -C "$RUN" -xf "$1/transformer.tar"
  tar -C "$RUN" -xf "$1/rest.tar"
  tar -C "$RUN" -xzf "$1/record.tar.gz"
  mkdir -p "$RUN/vae" && cp "$1/joint.pt" "$RUN/vae/joint.pt"
}

[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    check | build | vae | encoder | pretrain | mixed | score | pack) stage=$1 ;;
    export) stage=export_ ;;
    unpack)
      [ $# -gt 1 ] || { echo "mini_gpu.sh unpack: the folder that pack wrote is missing" >&2; exit 2; }
      unpack "$2"
      shift 2
      continue
      ;;
    *) echo "mini_gpu.sh: no stage $1; expected check, build, vae, encoder, pretrain, export, mixed, score, pack or unpack" >&2; exit 2 ;;
  esac
  echo "== $1 ($(date -u +%H:%M:%S))"
  $stage
  shift
done
