#!/usr/bin/env bash
# loadmaster beside what else generates from an OPT checkpoint on a CPU: transformers and CTranslate2 with
# everything in DRAM, or with --offload Accelerate's disk offload. Makes its own environment under
# target/peers (Python 3.11 or newer, pip; about 8 GB), the checkpoint (random weights, real file format)
# and CTranslate2's copy of it, then runs every row in a process of its own and prints one table.
#   benches/peers/run.sh --model opt-1.3b --batch 1,8,32 --prompt-len 128 --gen-len 32
#   benches/peers/run.sh --model opt-1.3b --offload --batch 8,64 --gen-len 8     makes a memory cgroup
#   benches/peers/run.sh --products          single linear layers beside PyTorch's and oneDNN's
#   benches/peers/run.sh --help           rows to choose from, rounds, threads
set -euo pipefail
cd "$(dirname "$0")/../.."
here=benches/peers
work=target/peers
mkdir -p "$work"

environment() {
  cmp -s "$here/requirements.txt" "$work/venv/made-from.txt" && return
  python_is_new_enough
  echo "making the peers' environment in $work/venv" >&2
  [ -d "$work/venv" ] || python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q -r "$here/requirements.txt" >&2
  cp "$here/requirements.txt" "$work/venv/made-from.txt"
}

# The pinned numpy asks for it.
python_is_new_enough() {
  local python=python3 advice="put a newer one first in PATH"
  [ ! -d "$work/venv" ] || python="$work/venv/bin/python" advice="remove $work/venv, which was made with it"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
  echo "the peers need Python 3.11 or newer, and $python is $("$python" --version 2>&1 || true): $advice" >&2
  exit 1
}

# Built beforehand where all are given.
program() {
  [ -z "${LOADMASTER:-}" ] || [ -z "${STREAMING:-}" ] || [ -z "${KERNELS:-}" ] || return 0
  cargo build -q --release
  LOADMASTER="${CARGO_TARGET_DIR:-target}/release/loadmaster"
  STREAMING="$(bench streaming)"
  KERNELS="$(bench kernels)"
  export LOADMASTER STREAMING KERNELS
}

bench() {
  local said
  said="$(cargo bench --no-run --bench "$1" 2>&1)" || { echo "$said" >&2; return 1; }
  sed -n 's/.*Executable.*(\(.*\))/\1/p' <<<"$said"
}

case " $* " in *" --help "* | *" -h "*)
  LOADMASTER=- STREAMING=- KERNELS=- exec python3 "$here/drive.py" --help ;;
esac
environment
program
exec "$work/venv/bin/python" "$here/drive.py" "$@"
