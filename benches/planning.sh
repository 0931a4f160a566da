#!/usr/bin/env bash
# How long planning takes: a dozen models, devices and workloads, each planned three times; prints the
# median of the wall seconds without and with --explain, and the planned tokens per second.
#   benches/planning.sh
# A profile of this machine must be there (`loadmaster probe`), so that nothing is measured meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
lm="${LOADMASTER:-target/release/loadmaster}"
[ -x "$lm" ] || cargo build --release
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
awk 'BEGIN { srand(7); for (i = 0; i < 10000; i++) {
  n = 1 + int(400 * rand()); printf "{\"prompt\": [7"; for (j = 1; j < n; j++) printf ",7";
  printf "], \"max_tokens\": %d}\n", 1 + int(64 * rand()) } }' >"$scratch/ragged.jsonl"
"$lm" probe >/dev/null

# name | flags of plan
rows() {
  cat <<ROWS
175b, T4, best block|--model opt-175b --profile t4-gcp --prompt-len 512 --gen-len 32
175b, T4, 4-bit|--model opt-175b --profile t4-gcp --prompt-len 512 --gen-len 32 --compress both
175b, T4, 200 prompts|--model opt-175b --profile t4-gcp --prompt-len 256 --gen-len 64 --num-prompts 200
175b, T4, whatever is fastest|--model opt-175b --profile t4-gcp --prompt-len 512 --gen-len 32 --compress fastest
66b, T4, 64 GiB|--model opt-66b --profile t4-gcp --cpu-mem 64GiB --prompt-len 512 --gen-len 32
30b, T4, 20 GiB|--model opt-30b --profile t4-gcp --cpu-mem 20GiB --prompt-len 1024 --gen-len 32
6.7b, T4, a million prompts|--model opt-6.7b --profile t4-gcp --prompt-len 128 --gen-len 32 --num-prompts 1000000
13b, CPU, 8 GiB|--model opt-13b --device cpu --cpu-mem 8GiB --prompt-len 128 --gen-len 16 --num-prompts 8
6.7b, CPU, 4 GiB|--model opt-6.7b --device cpu --cpu-mem 4GiB --prompt-len 512 --gen-len 32
1.3b, CPU, 1000 prompts|--model opt-1.3b --device cpu --cpu-mem 2GiB --prompt-len 64 --gen-len 64 --num-prompts 1000
1.3b, CPU, 10,000 ragged lines|--model opt-1.3b --device cpu --cpu-mem 4GiB --input $scratch/ragged.jsonl
6.7b, played GPU|--model opt-6.7b --device host:4GiB --cpu-mem 12GiB --prompt-len 256 --gen-len 32
175b, CPU, does not fit|--model opt-175b --device cpu --cpu-mem 150MiB --prompt-len 512 --gen-len 32
ROWS
}

median_s() {
  for _ in 1 2 3; do
    local from to
    from=$(date +%s%N)
    "$lm" plan "$@" >"$scratch/plan.txt" 2>/dev/null || true
    to=$(date +%s%N)
    echo $(((to - from) / 1000000))
  done | sort -n | sed -n 2p | awk '{ printf "%.2f", $1 / 1000 }'
}

printf '%-32s %8s %10s  %s\n' case 'plan s' 'explain s' 'planned'
while IFS='|' read -r name flags; do
  # shellcheck disable=SC2086
  plain=$(median_s $flags </dev/null)
  planned=$(grep -m1 -o '^[0-9.]* tok/s' "$scratch/plan.txt" || echo 'does not fit')
  # shellcheck disable=SC2086
  explained=$(median_s $flags --explain </dev/null)
  printf '%-32s %8s %10s  %s\n' "$name" "$plain" "$explained" "$planned"
done < <(rows)
