#!/usr/bin/env bash
# bash launch/single_node.sh collect --config configs/falcon-7b.yaml [more flags]
#
# collect, generate or evaluate on one machine: one process a GPU, started by torchrun. PROCESSES=N starts N.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/site.sh
exec $CONTAINER torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" -m aura_dist "$@"
