#!/usr/bin/env bash
# Lens-Mini from nothing on one CPU: latent space, text encoder, MMDiT at 64 pixels, at 128, then at all sizes; reasoner; scores.
#
#     bash train/runs/mini.sh
#
# Days of one core. Ctrl-C saves; the same command goes on where it stopped, and what is done is skipped.
# RUN (runs/mini) is the folder of states, logs and exports, PYTHON (python3) the interpreter. What each stage makes:
# docs/mini.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-runs/mini} PY=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
# glibc keeps freed memory between steps, in pages of 2 MiB: twice as fast and more (docs/mini.md)
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=200000000
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 THP_MEM_ALLOC_ENABLE=1
trap 'exit 130' INT # a stage that was interrupted has saved and returns 0: the next one must not begin
trap 'exit 143' TERM

# latents: a linear codec, then the FLUX.2-shaped decoder and encoder regressed onto it
"$PY" -m train vae --config mini --out "$RUN/vae"

# text encoder: next token, brief -> dense, linear readers
"$PY" -m train encoder --config mini --out "$RUN/encoder"

# 64 pixels; the text encoder trains along at first
if [ ! -e "$RUN/64/model_index.json" ]; then
  "$PY" -m train pretrain --config mini --vae "$RUN/vae" --encoder "$RUN/encoder/encoder.pt" --out "$RUN/base"
  "$PY" -m train pretrain --config mini --vae "$RUN/vae" --out "$RUN/base" --export "$RUN/64"
fi

# 128 pixels, the text encoder frozen, on a pool of encoded scenes
if [ ! -e "$RUN/128/model_index.json" ]; then
  "$PY" -m train pretrain --config mini/pretrain_128 --init "$RUN/64" --out "$RUN/base_128"
  "$PY" -m train pretrain --config mini/pretrain_128 --out "$RUN/base_128" --export "$RUN/128"
fi

# nine aspect ratios at bases 64, 96 and 128
if [ ! -e "$RUN/mini/model_index.json" ]; then
  "$PY" -m train pretrain --config mini/pretrain_sizes --init "$RUN/128" --out "$RUN/sizes"
  "$PY" -m train pretrain --config mini/pretrain_sizes --out "$RUN/sizes" --export "$RUN/mini"
fi

# layers of their own, by which the text encoder writes a dense caption for a wish
"$PY" -m train reasoner --config mini --init "$RUN/mini" --out "$RUN/reasoner"
"$PY" -m train reasoner --config mini --out "$RUN/reasoner" --export "$RUN/mini"

# the eight tasks by every judge, then further sizes
"$PY" -m train evaluate mini-bench --model "$RUN/mini" --out "$RUN/scores"
"$PY" -m train evaluate mini-bench --model "$RUN/mini" --out "$RUN/scores_by_size" --quick --sizes 64x64 96x96 128x128
echo "done: lens generate \"a red apple\" --model $RUN/mini -o apple.png"
