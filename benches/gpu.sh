#!/usr/bin/env bash
# What to run on a machine with a GPU: driver, CUDA libraries, this binary and the goldens are all it needs.
#   benches/gpu.sh goldens | rows | large     (LOADMASTER = binary, GOLDENS = checkpoints, OUT = where reports go,
#   SIZE, LARGE, PROMPT, GEN, BATCH, GPU_MEM = what is run; nothing is downloaded, weights are made up)
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
LOADMASTER="${LOADMASTER:-$here/target/release/loadmaster}"
GOLDENS="${GOLDENS:-$here/tests/goldens/models}"
OUT="${OUT:-$here/target/gpu}"
export LOADMASTER_HOME="${LOADMASTER_HOME:-$OUT/home}"
mkdir -p "$OUT"

say() { printf '\n=== %s\n' "$*"; }

# Tokens on the GPU against the host machine: one-token batches, so that both add up in fp32.
goldens() {
  local model name failed=0
  for model in "$GOLDENS"/*/; do
    name="$(basename "$model")"
    for device in cuda:0 host:1GiB; do
      "$LOADMASTER" run --model "$model" --device "$device" --percent 30 30 40 30 50 50 --gpu-batch-size 2 \
        --num-gpu-batches 2 --kv f32 --prompt-len 4 --gen-len 8 --num-prompts 4 --ignore-eos \
        --output "$OUT/$name-${device%%:*}.jsonl" --overwrite 2>"$OUT/$name-${device%%:*}.log"
    done
    if cmp -s <(sort "$OUT/$name-cuda.jsonl") <(sort "$OUT/$name-host.jsonl"); then
      echo "same tokens: $name"
    else
      echo "DIFFERENT tokens: $name" && failed=1
    fi
  done
  return "$failed"
}

# NAME FLAG...: plans, runs and keeps the report.
row() {
  local name="$1"
  shift
  say "$name"
  "$LOADMASTER" run --model "synth:$model" --device cuda:0 --prompt-len "${PROMPT:-512}" --gen-len "${GEN:-16}" \
    --output "$OUT/$name.jsonl" --overwrite --report "$OUT/$name.json" "$@" || echo "FAILED: $name"
}

rows() {
  local model="${SIZE:-opt-6.7b}" batch="${BATCH:-16}" shape limit
  say probe
  "$LOADMASTER" probe --device cuda:0
  for limit in "${GPU_MEM:-16GiB}" unlimited; do
    shape=(--gpu-batch-size "$batch" --num-gpu-batches 1 --num-prompts "$batch")
    [ "$limit" = unlimited ] || shape+=(--gpu-mem "$limit")
    row "planned-$limit" "${shape[@]}"
    row "resident-$limit" "${shape[@]}" --percent 100 0 100 0 100 0
    row "weights-dram-$limit" "${shape[@]}" --percent 0 100 100 0 100 0
    row "weights-dram-unpinned-$limit" "${shape[@]}" --percent 0 100 100 0 100 0 --pin-weight 0
    row "kv-dram-$limit" "${shape[@]}" --percent 0 100 0 100 100 0 --cpu-cache-compute 0
    row "kv-dram-cpu-$limit" "${shape[@]}" --percent 0 100 0 100 100 0 --cpu-cache-compute 1
    row "disk-$limit" "${shape[@]}" --percent 0 0 100 0 100 0
    row "q4-$limit" "${shape[@]}" --percent 0 100 100 0 100 0 --compress both
  done
  "$LOADMASTER" compare "$OUT"/*-"${GPU_MEM:-16GiB}".json "$OUT"/*-unlimited.json
}

large() {
  local model="${LARGE:-opt-30b}"
  GEN=8 row large --gpu-mem "${GPU_MEM:-16GiB}"
}

case "${1:-}" in
  goldens | rows | large) "$1" ;;
  *)
    echo "usage: benches/gpu.sh goldens | rows | large" >&2
    exit 2
    ;;
esac
