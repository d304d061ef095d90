#!/usr/bin/env bash
# sbatch launch/score_dask.sh score --config run.yaml [more flags]     (or bash, from a node that may submit jobs)
#
# Scoring by Dask workers that are Slurm jobs of their own: WORKERS (4) of them. DASK_WORKER says what each asks for, as
# options of dask-jobqueue's SLURMCluster ("queue=main cores=8 memory=32GB walltime=1:00:00"); so does `score: {slurm: …}`
# in the file.
#SBATCH --job-name=aura-score
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")
[ -f "$here/site.sh" ] || here=$SLURM_SUBMIT_DIR/launch # sbatch runs a copy of this file
cd "$here/.."
source launch/site.sh
# shellcheck disable=SC2086
exec $CONTAINER python -m aura_dist "$@" --dask slurm --num-workers "${WORKERS:-4}" \
  ${DASK_WORKER:+--slurm $DASK_WORKER}
