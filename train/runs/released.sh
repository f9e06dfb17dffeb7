#!/usr/bin/env bash
# Lens-Base by the paper's recipe: images -> shards -> 400,000 steps at 512x512 -> 400,000 at 27 sizes -> export.
#
#     IMAGES=photos CHECKPOINT=lens-base bash train/runs/released.sh shards           # once
#     CHECKPOINT=lens-base bash train/runs/released.sh pretrain mixed export           # on one node
#     NODES=16 HOST=node0 CHECKPOINT=lens-base bash train/runs/released.sh pretrain    # on each of sixteen, then mixed
#
# IMAGES: pictures with their captions beside them, see `python -m train shards --help`. CHECKPOINT: a released folder, whose
# VAE and text encoder encode the data; its MMDiT is not read. RUN (runs/released): what all nodes see. GPUS (8) of a node,
# WORKERS (8) that load for each. SIGTERM saves; the same command goes on where it stopped, on any number of GPUs.
# What it costs: `python -m train pretrain --config released/pretrain_512 --dry-run`. More: docs/training.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-runs/released} PY=${PYTHON:-python3} GPUS=${GPUS:-8} WORKERS=${WORKERS:-8} NODES=${NODES:-1}
LAST=step_0400000 # of either training
trap 'exit 130' INT # a training that was interrupted has saved and returns 0: the next one must not begin
trap 'exit 143' TERM

launch() { # a stage on every GPU of every node
  local nodes=(--standalone)
  [ "$NODES" = 1 ] || nodes=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HOST:?the first node}:29500")
  "$PY" -m torch.distributed.run "${nodes[@]}" --nproc-per-node "$GPUS" -m train "$@" --model "${CHECKPOINT:?a released folder}" \
    --device cuda --workers "$WORKERS"
}

shards() { # one set for both trainings, which take the buckets they ask for, and one held out
  : "${IMAGES:?a folder of pictures}"
  "$PY" -m train shards --images "$IMAGES" --held-out 0.001 --workers "$WORKERS" --out "$RUN/shards"
  "$PY" -m train shards --images "$IMAGES" --held-out 0.001 --split held_out --workers "$WORKERS" --out "$RUN/held_out"
}

pretrain() { # stage A, from fresh weights
  launch pretrain --config released/pretrain_512 --data "$RUN/shards" --validate "$RUN/held_out" --out "$RUN/512"
}

mixed() { # stage B, from A's averaged weights
  launch mixed_resolution --config released --data "$RUN/shards" --validate "$RUN/held_out" \
    --init "$RUN/512/checkpoints/$LAST" --out "$RUN/mixed"
}

export_() { # transformer/ of a released folder
  "$PY" -m train mixed_resolution --config released --out "$RUN/mixed" --export "$RUN/export"
}

[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
for stage in "$@"; do
  case "$stage" in
    shards | pretrain | mixed) "$stage" ;;
    export) export_ ;;
    *) echo "released.sh: no stage $stage; expected shards, pretrain, mixed or export" >&2; exit 2 ;;
  esac
done
