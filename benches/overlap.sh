#!/usr/bin/env bash
# What overlap brings: opt-6.7b mostly on disk at several batches, with it and without. Prints, per batch,
# the busier lane's seconds, wall seconds with overlap, their ratio, and wall without overlap ÷ with.
#   benches/overlap.sh [MODEL] [BATCHES…]     (default: opt-1.3b, 32 48 64 96; 10 % of the weights in DRAM)
set -euo pipefail
cd "$(dirname "$0")/.."
lm="${LOADMASTER:-target/release/loadmaster}"
[ -x "$lm" ] || cargo build --release
model="${1:-opt-1.3b}"
shift || true
batches=("$@")
[ ${#batches[@]} -gt 0 ] || batches=(32 48 64 96)
out="target/overlap"
mkdir -p "$out"
for batch in "${batches[@]}"; do
  for overlap in 1 0; do
    "$lm" run --model "synth:$model" --percent 0 10 0 100 0 100 --gpu-batch-size "$batch" --num-prompts "$batch" \
      --prompt-len 16 --gen-len 12 --ignore-eos --overlap "$overlap" --output "$out/out.jsonl" --overwrite \
      --report "$out/$batch-$overlap.json" >"$out/$batch-$overlap.log" 2>&1
  done
  python3 - "$batch" "$out/$batch-1.json" "$out/$batch-0.json" <<'PY'
import json, sys
batch, on, off = sys.argv[1], *(json.load(open(f))["measured"] for f in sys.argv[2:])
disk, cpu = (on["lanes"][lane]["decode_s"] for lane in ("disk_to_cpu", "cpu_compute"))
busier = max(disk, cpu)
print(f"batch {batch}: decode {on['decode_s']:.2f} s; disk {disk:.2f} s, cpu {cpu:.2f} s; "
      f"wall / busier lane {on['decode_s'] / busier:.3f}; without overlap / with {off['decode_s'] / on['decode_s']:.2f}")
PY
done
