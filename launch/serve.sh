#!/usr/bin/env bash
# AURA_INTERVENTION=run/interventions/aura@0.5 SERVE="--tensor-parallel-size 8 --dtype bfloat16" \
#   bash launch/serve.sh MODEL --toxicity-prompts rtp_prompts.jsonl --out run/results/aura.json     (or sbatch)
#
# `evaluate` with a vLLM server of MODEL that it starts, waits for and stops; the flags that follow are evaluate's.
# AURA_INTERVENTION=DIR[@STRENGTH] lays an intervention over the served model; an exported checkpoint needs none. SERVE
# holds flags of `vllm serve`, VLLM (vllm) its command. The server's log is beside --out. The same command again goes on
# where it was.
#SBATCH --job-name=aura-serve
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
model=${1:?usage: bash launch/serve.sh MODEL [flags of evaluate]}
shift
here=$(dirname "$0")
[ -f "$here/site.sh" ] || here=$SLURM_SUBMIT_DIR/launch # sbatch runs a copy of this file
cd "$here/.."
source launch/site.sh

laid=()
if [ -n "${AURA_INTERVENTION:-}" ]; then
  laid=(--intervention "$AURA_INTERVENTION")
  if [ ! -d "$AURA_INTERVENTION" ] && [ "${AURA_INTERVENTION%@*}" != "$AURA_INTERVENTION" ]; then
    laid=(--intervention "${AURA_INTERVENTION%@*}" --strength "${AURA_INTERVENTION##*@}")
  fi
fi
command=($CONTAINER python -m aura_dist evaluate --model "$model"
  --server "${VLLM:-vllm} serve {model} --host 127.0.0.1 --port {port} ${SERVE:-}" ${laid[@]+"${laid[@]}"} "$@")
if [ -z "${SLURM_JOB_ID:-}" ]; then
  exec "${command[@]}"
fi
code=0
srun "${command[@]}" || code=$?
end_of_job "$code"
