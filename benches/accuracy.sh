#!/usr/bin/env bash
# Predicted against measured over sizes, placements and batch shapes: writes the profile and all plans
# first and prints their hashes, then runs them one after the other, then compares. No checkpoint is
# needed. Needs about 10 GB of disk under the offload directory and 6 GiB of memory.
#   benches/accuracy.sh [FOLDER]        (default: target/accuracy)
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-target/accuracy}"
lm="${LOADMASTER:-target/release/loadmaster}"
mkdir -p "$out"
[ -x "$lm" ] || cargo build --release

# name | model | prompts prompt-len gen-len | policy flags
rows() {
  cat <<'ROWS'
125m-dram-8|opt-125m|8 64 32|--percent 0 100 0 100 0 100 --gpu-batch-size 8
125m-disk-16|opt-125m|16 128 32|--percent 0 20 0 100 0 100 --gpu-batch-size 16
125m-mixed-32|opt-125m|32 64 16|--percent 0 50 0 50 0 50 --gpu-batch-size 32
1.3b-dram-1|opt-1.3b|1 128 32|--percent 0 100 0 100 0 100 --gpu-batch-size 1
1.3b-dram-8|opt-1.3b|8 128 32|--percent 0 100 0 100 0 100 --gpu-batch-size 8
1.3b-disk-8|opt-1.3b|8 64 16|--percent 0 10 0 100 0 100 --gpu-batch-size 8
1.3b-half-32|opt-1.3b|32 64 16|--percent 0 50 0 100 0 100 --gpu-batch-size 32
1.3b-kvdisk-16|opt-1.3b|16 128 16|--percent 0 100 0 0 0 100 --gpu-batch-size 16
1.3b-q4-8|opt-1.3b|8 128 32|--percent 0 100 0 100 0 100 --gpu-batch-size 8 --compress-weight
1.3b-q4both-disk-16|opt-1.3b|16 128 16|--percent 0 30 0 50 0 100 --gpu-batch-size 16 --compress-weight --compress-cache
1.3b-two-batches|opt-1.3b|16 64 16|--percent 0 40 0 100 0 100 --gpu-batch-size 8 --num-gpu-batches 2
1.3b-no-overlap|opt-1.3b|8 64 16|--percent 0 30 0 100 0 100 --gpu-batch-size 8 --overlap 0
2.7b-half-16|opt-2.7b|16 128 16|--percent 0 50 0 100 0 100 --gpu-batch-size 16
2.7b-disk-32|opt-2.7b|32 64 12|--percent 0 10 0 50 0 100 --gpu-batch-size 32
ROWS
}

"$lm" probe
plan_one() {
  local name="$1" model="$2" flags="$4"
  read -r prompts prompt gen <<<"$3"
  # shellcheck disable=SC2086
  "$lm" plan --model "synth:$model" --num-prompts "$prompts" --prompt-len "$prompt" --gen-len "$gen" \
    $flags -o "$out/$name.toml" >"$out/$name.plan.txt"
}
while IFS='|' read -r name model shape flags; do
  plan_one "$name" "$model" "$shape" "$flags" </dev/null
done < <(rows)
sha256sum "$out"/*.toml

reports=()
while IFS='|' read -r name _; do
  "$lm" exec "$out/$name.toml" --ignore-eos --output "$out/$name.jsonl" --overwrite \
    --report "$out/$name.json" </dev/null >"$out/$name.log" 2>&1
  reports+=("$out/$name.json")
done < <(rows)
"$lm" compare "${reports[@]}" | tee "$out/compare.txt"
