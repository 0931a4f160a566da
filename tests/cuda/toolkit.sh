#!/usr/bin/env bash
# NVIDIA's compiler, for checks only: installs the pinned wheels under target/cuda-toolkit (once) and prints the
# directory that holds bin/nvcc. Nothing of it is needed to build or run the program.
set -euo pipefail
cd "$(dirname "$0")/../.."
home="$PWD/target/cuda-toolkit"
# All by name: nvcc's own dependencies are not pinned, and these versions belong together.
PINNED=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88)

mkdir -p "$home"
exec 9>"$home/lock"
flock 9
if [ ! -e "$home/installed" ] || [ "$(cat "$home/installed")" != "${PINNED[*]}" ]; then
  rm -rf "$home/venv"
  python3 -m venv "$home/venv" >&2
  "$home/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${PINNED[@]}" >&2
  echo "${PINNED[*]}" > "$home/installed"
fi
dirname "$(dirname "$(find "$home/venv" -path '*/bin/nvcc' -print -quit)")"
