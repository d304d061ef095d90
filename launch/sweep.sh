#!/usr/bin/env bash
# sbatch --time 2-0 launch/sweep.sh configs/sweep-paper.yaml [more flags]     (or bash, in tmux on a login node)
#
# Submits a sweep's jobs, each after those it needs, and keeps its table. It may end at any time: jobs in the queue go on,
# and the same command follows them again. What the jobs ask of Slurm stands in the file, under `resources`.
#SBATCH --job-name=aura-sweep
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")
[ -f "$here/site.sh" ] || here=$SLURM_SUBMIT_DIR/launch # sbatch runs a copy of this file
cd "$here/.."
source launch/site.sh
exec $CONTAINER python -m aura_dist sweep --launcher slurm --config "$@"
