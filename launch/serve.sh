#!/usr/bin/env bash
# AURA_INTERVENTION=run/interventions/aura@0.5 SERVE="--tensor-parallel-size 8 --dtype bfloat16" \
#   bash launch/serve.sh MODEL --toxicity-prompts rtp_prompts.jsonl --out run/results/aura.json     (or sbatch)
#
# Starts a vLLM server of MODEL, waits until it answers, runs `evaluate --server` with the flags that follow, stops the
# server, and ends with evaluate's exit code. AURA_INTERVENTION=DIR[@STRENGTH] lays an intervention over the served model;
# an exported checkpoint needs none. SERVE holds flags of `vllm serve`, VLLM (vllm) its command. The log of the server is
# SERVER_LOG (serve-PORT.log). The same command again goes on where it was.
#SBATCH --job-name=aura-serve
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@120
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
port=${PORT:-$((8000 + ${SLURM_JOB_ID:-0} % 1000))}
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do # another program listens there
  port=$((port + 1))
done
log=${SERVER_LOG:-serve-$port.log}
export NO_PROXY="127.0.0.1,localhost,${NO_PROXY:-${no_proxy:-}}"
export no_proxy=$NO_PROXY

# shellcheck disable=SC2086
${VLLM:-vllm} serve "$model" --host 127.0.0.1 --port "$port" ${SERVE:-} >"$log" 2>&1 &
server=$!
warned=$((128 + $(kill -l USR1)))
finish() {
  local code=$?
  kill "$server" 2>/dev/null && wait "$server" || true
  if [ "$code" -eq "$warned" ] && [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-100}" ]; then
    echo "warned by Slurm: requeued as job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
trap finish EXIT
trap 'exit $warned' USR1
trap 'exit 143' TERM INT

healthy() {
  local status=""
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
  printf 'GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n' >&3
  read -r -t 10 status <&3 || true
  exec 3>&-
  [[ $status == *" 200"* ]]
}
end=$((SECONDS + ${SERVER_SECONDS:-1800}))
until healthy 2>/dev/null; do
  if ! kill -0 "$server" 2>/dev/null || [ "$SECONDS" -ge "$end" ]; then
    tail -n 20 "$log" >&2
    echo "error: expected a server of $model within ${SERVER_SECONDS:-1800} s, got none; see $log" >&2
    exit 2
  fi
  sleep 1
done

code=0
$CONTAINER python -m aura_dist evaluate --model "$model" --server "http://127.0.0.1:$port/v1" \
  ${laid[@]+"${laid[@]}"} "$@" &
evaluate=$!
trap 'kill -USR1 "$evaluate" 2>/dev/null || true' USR1
trap 'kill -TERM "$evaluate" 2>/dev/null || true' TERM INT
wait "$evaluate" || code=$?
while kill -0 "$evaluate" 2>/dev/null; do # a signal has ended the wait, not evaluate
  code=0
  wait "$evaluate" || code=$?
done
exit "$code"
