#!/usr/bin/env bash
# What to run on a machine with a GPU: driver, CUDA libraries, this binary and the goldens are all it needs;
# nothing is downloaded, weights are made up straight into memory (only what a row keeps on disk is written), and
# all rows of a model run in one process. Each stage ends within eight minutes, prints what belongs into
# docs/measurements.md, and fails when anything in it does:
#   benches/gpu.sh goldens     tokens on the GPU against transformers' own (the same in fp32) and the host machine's (the
#                              same in fp32, alike in fp16 and 4 bits), random placements against each other,
#                              compute-sanitizer where there is one
#   benches/gpu.sh rows        probe, then predicted against measured under GPU_MEM: the plan's own choice, all on the
#                              GPU, weights and KV in DRAM, attention on the CPU, disk, 4-bit; `rows unlimited` without
#                              that bound
#   benches/gpu.sh large       a model that the GPU does not hold, eight tokens
#   benches/gpu.sh peer        FlexLLMGen itself at the policies of `rows`, where Python has it and PyTorch, beside what
#                              `rows` measured; `peer NAME...` those rows alone: each makes its model anew, and on a
#                              slow machine all of them are more than eight minutes
# LOADMASTER = binary, GOLDENS = checkpoints, OUT = where reports go, SIZE and LARGE = models (a size or a directory),
# PROMPT, GEN, BATCH (even), LARGE_PROMPTS, GPU_MEM = what is run; GOLDEN_PROMPT, GOLDEN_GEN, PLACEMENTS (how many) = of the
# goldens; PYTHON = of the peer.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
LOADMASTER="${LOADMASTER:-$here/target/release/loadmaster}"
GOLDENS="${GOLDENS:-$here/tests/goldens/models}"
OUT="${OUT:-$here/target/gpu}"
SIZE="${SIZE:-opt-6.7b}" LARGE="${LARGE:-opt-30b}" GPU_MEM="${GPU_MEM:-16GiB}"
GOLDEN_PROMPT="${GOLDEN_PROMPT:-23}" GOLDEN_GEN="${GOLDEN_GEN:-8}"
PROMPT="${PROMPT:-512}" GEN="${GEN:-16}" BATCH="${BATCH:-8}" LARGE_PROMPTS="${LARGE_PROMPTS:-64}"
PLACEMENTS="${PLACEMENTS:-12}" PYTHON="${PYTHON:-python3}"
# Toolkits put compute-sanitizer there, where few paths lead.
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export LOADMASTER_HOME="${LOADMASTER_HOME:-$OUT/home}"
# So long a stage runs; then it is asked to end, and killed where it has not.
STAGE_SECONDS="${STAGE_SECONDS:-460}" GRACE_SECONDS="${GRACE_SECONDS:-20}"
# A row's weights and cache on disk, no more.
DISK_SPACE=20GB
# Bytes that device memory may be above its plan: the driver gives it out in pieces of 2 MiB, of which an arena and what
# the libraries take end in one each, and keeps the page tables of page-locked DRAM there.
DEVICE_SLACK=$((8 << 20))
mkdir -p "$OUT"
faults=0

say() { printf '\n=== after %d s: %s\n' "$SECONDS" "$*"; }
fault() { echo "FAILED: $*" && faults=$((faults + 1)); }
# What stands above a table of measurements.
machine() {
  date -u +%Y-%m-%d
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max --format=csv,noheader || true
  else
    head -n 1 /proc/driver/nvidia/version 2>/dev/null || echo "driver: unknown"
  fi
  echo "$(nproc) cores, $(grep MemTotal /proc/meminfo), $(uname -r)"
  df -h --output=fstype,size,avail "$OUT" | tail -n 1
}
bounded() { # what the stage has no time for is not begun: where each takes its grace, it would end much later
  local seconds=$((STAGE_SECONDS - SECONDS))
  [ "$seconds" -gt 0 ] || { echo "no time left" >&2 && return 124; }
  timeout -k "$GRACE_SECONDS" "$seconds" "$@"
}
program() { bounded "$LOADMASTER" "$@"; }
model() { if [ -d "$1" ]; then echo "$1"; else echo "synth:$1"; fi; }

# NAME FLAG...: the runs on stdin, one a line, in one process; results, reports and the comparison (NAME.txt) go to
# $OUT. What a budget does not hold is said, and is no fault; so is what could not be page-locked as planned.
series() {
  local name="$1"
  shift
  if ! program series - --out "$OUT" -- "$@" 2>"$OUT/$name.log" >"$OUT/$name.txt"; then
    cat "$OUT/$name.log"
    fault "$name: $(tail -n 1 "$OUT/$name.log")"
  fi
  awk '/^run / { run = $2 } /^note: / { print run " " $0 } /^[^ ]* does not fit: /' "$OUT/$name.log"
}

same() { # WHAT RESULTS RESULTS
  if [ -s "$2" ] && [ -s "$3" ] && cmp -s <(sort "$2") <(sort "$3"); then echo "same tokens: $1"; else fault "other tokens: $1"; fi
}

# RESULTS: the token ids of each line, in the order of the lines.
token_lists() {
  sed -n 's/^{"index":\([0-9]*\),.*"token_ids":\[\([0-9,]*\)\].*/\1 \2/p' "$1" | sort -n | cut -d ' ' -f 2
}

# WHAT LEAST RESULTS RESULTS: where each machine rounds in its own order, LEAST per cent of the tokens are the same,
# place by place, a missing one being another: a line differs from its first near tie on, what a wrong kernel makes from
# its first token on, or the second.
alike() {
  local share
  share="$(paste -d '|' <(token_lists "$3") <(token_lists "$4") | awk -F '|' '
    { n = split($1, a, ","); m = split($2, b, ","); if (n < m) n = m
      all += n; for (i = 1; i <= n; i++) good += a[i] == b[i] }
    END { printf "%d", all ? 100 * good / all : 0 }')"
  if [ "$share" -ge "$2" ]; then echo "$share % of tokens alike: $1"; else fault "only $share % of tokens alike: $1"; fi
}

# WHAT RESULTS RESULTS: after the prompt alone, what is rounded has not yet added up to another token (in none of 64
# lines under the emulated driver).
same_first() {
  if [ -s "$2" ] && [ -s "$3" ] &&
    cmp -s <(token_lists "$2" | cut -d , -f 1) <(token_lists "$3" | cut -d , -f 1); then
    echo "same first tokens: $1"
  else
    fault "other first tokens: $1"
  fi
}

# MODEL: a golden checkpoint's own prompts and what transformers made of them, one a line, as golden.json has them.
own_cases() {
  grep -o '"prompt":\[[0-9,]*\],"ids":\[[0-9,]*\]' "$1/golden.json" || true
}

# NAME MODEL: the tokens are transformers' own.
own() {
  local ids="$OUT/$1-own.ids"
  own_cases "$2" | sed 's/.*\[\(.*\)\]/\1/' >"$ids"
  if [ -s "$ids" ] && cmp -s "$ids" <(token_lists "$OUT/$1-own.jsonl"); then
    echo "transformers' tokens: $1"
  else
    fault "not transformers' tokens: $1"
  fi
}

# Two percentages that sum to at most 100, behind $words: a subshell would draw numbers of its own.
draw_shares() {
  local first=$((RANDOM % 5))
  words+=" $((first * 25)) $((RANDOM % (5 - first) * 25))"
}

goldens() {
  local path name round words split="--percent 30 30 40 30 50 50 --gpu-batch-size 2 --num-gpu-batches 2"
  local fp32="--compute fp32 --kv f32" format drawn="--prompt-len $GOLDEN_PROMPT --gen-len $GOLDEN_GEN --num-prompts 4"
  # What fp32 never meets: tensor cores, fp16 and 4-bit caches, 4-bit weights.
  local -A formats=([fp16]="--kv f16" [cache4]="--compress-cache 1" [weights4]="--compute fp32 --compress-weight 1")
  # 87, 68 and 100 were the least under the emulated driver; most of a line, of four, is left to a GPU's own order.
  local -A least=([fp16]=70 [cache4]=50 [weights4]=80)
  # What an earlier run left must not stand in for a failed one's.
  rm -f "$OUT"/*-{gpu,host,own}.jsonl "$OUT"/placement-*.jsonl
  for path in "$GOLDENS"/*/; do
    name="$(basename "$path")"
    own_cases "$path" | sed 's/^\(.*\),"ids".*/{\1}/' >"$OUT/$name-own-prompts.jsonl"
    {
      # Twelve tokens of each are in golden.json.
      echo "$name-own --device cuda:0 $split $fp32 --gen-len 12 --input $OUT/$name-own-prompts.jsonl"
      echo "$name-gpu --device cuda:0 $split $fp32 $drawn"
      echo "$name-host --device host:1GiB $split $fp32 $drawn"
      for format in "${!formats[@]}"; do
        echo "$name-$format-gpu --device cuda:0 $split ${formats[$format]} $drawn"
        echo "$name-$format-host --device host:1GiB $split ${formats[$format]} $drawn"
      done
    } >"$OUT/$name.lines"
    series "$name" --model "$path" --ignore-eos <"$OUT/$name.lines"
    own "$name" "$path"
    same "$name" "$OUT/$name-gpu.jsonl" "$OUT/$name-host.jsonl"
    for format in "${!formats[@]}"; do
      alike "$name $format" "${least[$format]}" "$OUT/$name-$format-gpu.jsonl" "$OUT/$name-$format-host.jsonl"
    done
    same_first "$name fp16" "$OUT/$name-fp16-gpu.jsonl" "$OUT/$name-fp16-host.jsonl"
  done
  say "random placements"
  RANDOM=7
  for round in $(seq "$PLACEMENTS"); do
    words="placement-$round --device cuda:0 --percent"
    draw_shares && draw_shares && draw_shares
    words+=" --gpu-batch-size $((1 + RANDOM % 4)) --num-gpu-batches $((1 + RANDOM % 3)) --pin-weight $((RANDOM % 2))"
    words+=" --overlap $((RANDOM % 2)) --cpu-cache-compute $((RANDOM % 2)) --cpu-compute-share $((RANDOM % 3 * 50))"
    # With a store and without.
    [ $((RANDOM % 2)) -eq 0 ] || words+=" --unpacked"
    echo "$words"
  done >"$OUT/placements.lines"
  series placements --model "$path" --ignore-eos $drawn $fp32 <"$OUT/placements.lines"
  while read -r round words; do
    same "$words" "$OUT/$round.jsonl" "$OUT/$name-host.jsonl"
  done <"$OUT/placements.lines"
  # Tensor cores and copies to shared memory that go on by themselves are in the kernels of fp16 and 4 bits alone.
  sanitize "memcheck racecheck synccheck" "$path" $split --kv f16 --compress-weight 1
  sanitize "memcheck racecheck" "$path" $split --compress-cache 1
  sanitize memcheck "$path" $split $fp32
}

sanitize() { # TOOLS MODEL FLAG...
  local tool
  if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer here: $1 left out"
    return
  fi
  for tool in $1; do
    say "compute-sanitizer $tool: ${*:3}"
    bounded compute-sanitizer --tool "$tool" --error-exitcode 9 "$LOADMASTER" run --model "$2" --device cuda:0 \
      --prompt-len "$GOLDEN_PROMPT" --gen-len 2 --num-prompts 4 --output "$OUT/sanitized.jsonl" --overwrite "${@:3}" ||
      fault "$tool"
  done
}

# The policies of every table, one a line: name, then flags. The slowest last: if time runs out, the others are there.
# The CPU attends for one batch while the GPU has another: that row has as many prompts in two.
policies() {
  local one="--gpu-batch-size $BATCH --num-gpu-batches 1" two="--gpu-batch-size $((BATCH / 2)) --num-gpu-batches 2"
  cat <<END
resident --percent 100 0 100 0 100 0 $one
weights-dram --percent 0 100 100 0 100 0 $one
weights-dram-unpinned --percent 0 100 100 0 100 0 $one --pin-weight 0
kv-dram --percent 0 100 0 100 100 0 $one --cpu-cache-compute 0
kv-dram-cpu --percent 0 100 0 100 100 0 $two --cpu-cache-compute 1
q4 --percent 0 100 100 0 100 0 $one --compress-weight 1 --compress-cache 1
disk --percent 0 0 100 0 100 0 $one
END
}

# NAME MODEL FLAG...: the runs on stdin, with weights made up in memory, what was predicted beside them, and the flags that
# each plan came to: what a row does not say is the planner's choice.
made() {
  local name="$1" model="$2" run
  shift 2
  series "$name" --device cuda:0 --model "$(model "$model")" --unpacked --prompt-len "$PROMPT" --ignore-eos \
    --disk-space "$DISK_SPACE" "$@"
  cat "$OUT/$name.txt"
  while read -r run; do
    echo "$run: $(figure "$OUT/$run.json" plan.flags)"
    device_memory "$run"
  done < <(sed -n 's/^Predicted against measured (\([^ ]*\), plan .*/\1/p' "$OUT/$name.txt")
}

# REPORT KEYS: what stands behind keys joined by dots, one a line in a report; nothing where it has none.
figure() {
  awk -v wanted="$2" '
    { depth = (match($0, /[^ ]/) - 1) / 2; key = $1; gsub(/[":]/, "", key)
      keys[depth] = (depth > 1 ? keys[depth - 1] "." : "") key }
    keys[depth] == wanted { sub(/^[^:]*: /, ""); gsub(/"|,$/, ""); print; exit }' "$1" 2>/dev/null || true
}

# RUN: the device memory that the management library counted is the plan's: not above it, and within 3 %. Where it was
# not told, that is a fault, too.
device_memory() {
  local planned held
  planned="$(figure "$OUT/$1.json" plan.estimate.tiers.gpu.peak_bytes)"
  held="$(figure "$OUT/$1.json" measured.tiers.gpu.peak_bytes)"
  if ! [[ "$planned $held" =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]]; then
    fault "$1: device memory is not known: planned ${planned:-nothing}, measured ${held:-nothing}"
  elif [ "$held" -gt $((planned + DEVICE_SLACK)) ]; then
    fault "$1: $held bytes of device memory, more than the $planned planned"
  elif [ $((100 * held)) -lt $((97 * planned)) ]; then
    fault "$1: $held bytes of device memory, over 3 % less than the $planned planned"
  fi
}

rows() {
  local limit="${1:-$GPU_MEM}" memory=()
  [ "$limit" = unlimited ] || memory=(--gpu-mem "$limit")
  say probe
  program probe --device cuda:0 || fault probe
  say "predicted against measured, GPU memory $limit"
  # Not from a pipe: behind one, faults would be counted in a shell of their own. Where a row does not say 4 bits, it
  # must not get them because 16 do not fit.
  made "rows-$limit" "$SIZE" --gen-len "$GEN" --num-prompts "$BATCH" "${memory[@]}" \
    < <({ echo planned && policies; } | sed -e "s/^[^ ]*/&-$limit/" -e '/--compress-/! s/$/ --compress never/')
  # The bound and the batch are chosen so that it does. Without a bound it is up to the GPU.
  if [ "$limit" != unlimited ] && grep -q "^resident-$limit does not fit: " "$OUT/rows-$limit.log"; then
    fault "resident-$limit does not fit: lower BATCH ($BATCH)"
  fi
}

large() {
  made large "$LARGE" --gen-len 8 --num-prompts "$LARGE_PROMPTS" --gpu-mem "$GPU_MEM" <<<"large --compress never"
}

peer() {
  local name words wanted=" $* "
  if ! "$PYTHON" -c 'import torch, flexllmgen' 2>/dev/null; then
    echo "no PyTorch with FlexLLMGen here ($PYTHON): left out"
    return
  fi
  rm -f "$OUT"/peer-*.log
  while read -r name words; do
    [ $# -eq 0 ] || [[ "$wanted" == *" $name "* ]] || continue
    # Pinning and who attends are its flags, too.
    say "FlexLLMGen $name"
    bounded "$PYTHON" "$here/benches/flexllmgen.py" --model "facebook/$SIZE" --path _DUMMY_ \
      --offload-dir "$OUT/peer" --log-file /dev/null --prompt-len "$PROMPT" --gen-len "$GEN" $(peer_words "$words") \
      </dev/null | tee "$OUT/peer-$name.log" || fault "FlexLLMGen $name"
    beside "$name"
  done < <(policies)
}

# NAME: tokens a second of both, end to end, from what `rows` left (any bound of memory: the policy is the same).
beside() {
  local ours theirs
  theirs="$(sed -n 's/.*total throughput: \([0-9.]*\) token.*/\1/p' "$OUT/peer-$1.log" | tail -n 1)"
  [ -n "$theirs" ] || { fault "FlexLLMGen printed no throughput for $1" && return; }
  # Without any the stage goes on: a failing part of a pipe would end it.
  ours="$({ cat "$OUT"/rows-*.txt 2>/dev/null || true; } | awk -v row="$1-" '
    /^Predicted against measured/ { mine = $0 ~ "\\(" row "(unlimited|[0-9])" }
    mine && $1 == "throughput" { print $4; exit }')"
  awk -v name="$1" -v ours="${ours:-0}" -v theirs="$theirs" 'BEGIN {
    if (ours > 0) printf "%s: ours %.3f tok/s, FlexLLMGen %.3f tok/s, x %.2f\n", name, ours, theirs, ours / theirs
    else printf "%s: FlexLLMGen %.3f tok/s; run the stage rows for ours\n", name, theirs }'
}

# Its switches stand alone.
peer_words() {
  sed -e 's/--cpu-cache-compute 0//' -e 's/--cpu-cache-compute 1/--cpu-cache-compute/' \
    -e 's/--compress-weight 1/--compress-weight/' -e 's/--compress-cache 1/--compress-cache/' <<<"$1"
}

case "${1:-}" in
  goldens | rows | large | peer)
    machine
    "$@"
    say "$1: $faults failed, $(date -u +%Y-%m-%d), $(timeout -k 1 5 "$LOADMASTER" --version)"
    [ "$faults" -eq 0 ]
    ;;
  *)
    echo "usage: benches/gpu.sh goldens | rows [unlimited] | large | peer" >&2
    exit 2
    ;;
esac
