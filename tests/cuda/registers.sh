#!/usr/bin/env bash
# Compiles every kernel with NVIDIA's own compiler for sm_75, sm_80 and sm_90 (no GPU needed) and compares registers
# and shared memory with kernels/registers.txt. A spill or a stack frame is an error. Then the same through NVRTC,
# as the program compiles them.
#   tests/cuda/registers.sh          check
#   tests/cuda/registers.sh write    write the table anew
set -euo pipefail
cd "$(dirname "$0")/../.."
toolkit="$(tests/cuda/toolkit.sh)"
nvcc="$toolkit/bin/nvcc"
work="$PWD/target/cuda-registers"
mkdir -p "$work"

report() { # ARCH FILE: "kernel registers shared" lines
  local log="$work/$2-$1.log"
  "$nvcc" --std=c++17 --fmad=false -Xptxas -v -cubin -arch="$1" "kernels/$2.cu" -o "$work/$2-$1.cubin" > "$log" 2>&1 ||
    { cat "$log" >&2; return 1; }
  awk -v arch="$1" '
    /Compiling entry function/ { match($0, /\047[^\047]+\047/); name = substr($0, RSTART + 1, RLENGTH - 2) }
    /bytes stack frame/ { if ($1 + 0 || $5 + 0 || $9 + 0) { print "spills: " name " " arch ": " $0 > "/dev/stderr"; bad = 1 } }
    /Used [0-9]+ registers/ {
      match($0, /Used [0-9]+/); used = substr($0, RSTART + 5, RLENGTH - 5); shared = 0
      if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH - 11)
      print name, arch, used, shared
    }
    END { exit bad }' "$log"
}

for file in kernels/*.cu; do
  name="$(basename "$file" .cu)"
  # Two at a time: each is one process.
  report sm_75 "$name" > "$work/$name.75" & pid=$!
  report sm_80 "$name" > "$work/$name.80"
  wait "$pid"
  report sm_90 "$name" > "$work/$name.90"
done
{
  echo "# Registers a thread on sm_75, sm_80, sm_90, and the most bytes of shared memory; no kernel spills. tests/cuda/registers.sh"
  sort "$work"/*.75 "$work"/*.80 "$work"/*.90 | awk '
    $1 != name { if (name) print name, r["sm_75"], r["sm_80"], r["sm_90"], shared; name = $1; shared = 0 }
    { r[$2] = $3; if ($4 > shared) shared = $4 }
    END { print name, r["sm_75"], r["sm_80"], r["sm_90"], shared }'
} > "$work/registers.txt"
if [ "${1:-check}" = write ]; then
  cp "$work/registers.txt" kernels/registers.txt
  exit
fi
diff -u kernels/registers.txt "$work/registers.txt" ||
  { echo "error: registers changed; if that is meant: tests/cuda/registers.sh write" >&2; exit 1; }
python3 tests/cuda/nvrtc.py "$toolkit/lib/libnvrtc.so.13"
