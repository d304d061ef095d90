#!/usr/bin/env bash
# sbatch --time 2-0 launch/sweep.sh configs/sweep-paper.yaml [more flags]     (or bash, in tmux on a login node)
#
# Submits a sweep's jobs, each after those it needs, and updates its table. It may end at any time: queued jobs still run,
# and the same command follows them again. `resources` in the file says what the jobs ask of Slurm.
#SBATCH --job-name=aura-sweep
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")
[ -f "$here/site.sh" ] || here=$SLURM_SUBMIT_DIR/launch # sbatch runs a copy of this file
cd "$here/.."
source launch/site.sh
exec $CONTAINER python -m aura_dist sweep --launcher slurm --config "$@"
