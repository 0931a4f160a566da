#!/usr/bin/env bash
# loadmaster beside what else generates from an OPT checkpoint on a CPU: transformers and CTranslate2 with
# everything in DRAM, or with --offload Accelerate's disk offload. Makes its own environment under
# target/peers (Python 3.10 or newer, pip; about 8 GB), the checkpoint (random weights, real file format)
# and CTranslate2's copy of it, then runs every row in a process of its own and prints one table.
#   benches/peers/run.sh --model opt-1.3b --batch 1,8,32 --prompt-len 128 --gen-len 32
#   benches/peers/run.sh --model opt-1.3b --offload --batch 8,64 --gen-len 8
#   benches/peers/run.sh --products          single linear layers beside PyTorch's and oneDNN's
#   benches/peers/run.sh --help           rows to choose from, rounds, threads
set -euo pipefail
cd "$(dirname "$0")/../.."
here=benches/peers
work=target/peers
mkdir -p "$work"

environment() {
  cmp -s "$here/requirements.txt" "$work/venv/made-from.txt" && return
  echo "making the peers' environment in $work/venv" >&2
  [ -d "$work/venv" ] || python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q -r "$here/requirements.txt" >&2
  cp "$here/requirements.txt" "$work/venv/made-from.txt"
}

# Built beforehand where all are given.
program() {
  [ -z "${LOADMASTER:-}" ] || [ -z "${STREAMING:-}" ] || [ -z "${KERNELS:-}" ] || return 0
  cargo build -q --release
  LOADMASTER=target/release/loadmaster
  STREAMING="$(bench streaming)"
  KERNELS="$(bench kernels)"
  export LOADMASTER STREAMING KERNELS
}

bench() {
  cargo bench --no-run --bench "$1" 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p'
}

case " $* " in *" --help "* | *" -h "*)
  LOADMASTER=- STREAMING=- KERNELS=- exec python3 "$here/drive.py" --help ;;
esac
environment
program
exec "$work/venv/bin/python" "$here/drive.py" "$@"
