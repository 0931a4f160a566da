#!/usr/bin/env bash
# What overlap brings: a model mostly on disk at several batches, with it and without. Prints, per batch,
# both lanes' busy seconds, wall seconds against the busier one, and wall without overlap ÷ with.
#   benches/overlap.sh [MODEL] [BATCHES…]     (default: opt-1.3b, 48 64 80; 10 % of the weights in DRAM)
set -euo pipefail
cd "$(dirname "$0")/.."
model="${1:-opt-1.3b}"
shift || true
[ $# -gt 0 ] || set -- 48 64 80
batches="$*"
exec cargo bench -q --bench streaming -- overlap model="$model" batches="${batches// /,}"
