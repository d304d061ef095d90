#!/usr/bin/env bash
# RANKS="--nodes 2 --ntasks-per-node 8 --gpus-per-node 8" STEP="--cpus-per-task 16 --mem 64G" \
#   bash launch/pipeline.sh configs/falcon-40b.yaml
#
# Submits collect → score → fit → evaluate as four jobs, each to start when the one before has succeeded, and prints their
# numbers. RANKS and STEP are sbatch's flags for the stages of many ranks (collect, evaluate) and of one process. With
# WORKERS=N, N Dask workers score (see score_dask.sh); RANKS_SCRIPT=launch/multi_node.sbatch starts ranks by torchrun. The
# same command again does what is left: it keeps a finished store and finished scores. It checks the settings of all four
# stages before it submits a job.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?usage: bash launch/pipeline.sh CONFIG.yaml}
source launch/site.sh
for verb in collect score fit evaluate; do
  $CONTAINER aura-dist "$verb" --config "$config" --check || {
    echo "nothing is submitted: $verb lacks what it needs" >&2
    exit 2
  }
done
if [ -n "${SLURM_JOB_ID:-}" ]; then # within an allocation: the jobs would inherit its settings
  for name in $(compgen -v SLURM_) $(compgen -v SRUN_); do
    [ "$name" = SLURM_CONF ] || unset "$name"
  done
fi
after=""
for verb in collect score fit evaluate; do
  case $verb in
  collect | evaluate) script=${RANKS_SCRIPT:-launch/ranks.sbatch} flags=${RANKS:-} ;;
  score) script=launch/$([ -n "${WORKERS:-}" ] && echo score_dask.sh || echo step.sbatch) flags=${STEP:-} ;;
  *) script=launch/step.sbatch flags=${STEP:-} ;;
  esac
  # shellcheck disable=SC2086
  job=$(sbatch --parsable --job-name "aura-$verb" $flags ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} \
    "$script" "$verb" --config "$config")
  after=${job%%;*}
  echo "$verb $after"
done
