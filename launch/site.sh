# Sourced by every other script here: what your site needs before Python starts. Write it into a file of your own, and
# name the file by $SITE (module load …, export NCCL_SOCKET_IFNAME=…, CONTAINER=…).
#   CONTAINER   words in front of Python's commands, such as "apptainer exec --nv image.sif"
if [ -n "${SITE:-}" ]; then
  set +u # module systems and conda read variables that are not set
  # shellcheck disable=SC1090
  source "$SITE"
  set -u
fi
if [ -z "${CONTAINER:-}" ] && [ -f .venv/bin/activate ]; then
  source .venv/bin/activate
fi
CONTAINER=${CONTAINER:-}
# since Slurm 22.05 srun gives a task one core by default, however many the job has
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# ranks meet at the first node of the allocation; the port follows from the job's number (Linux gives those from
# 32768 on to outgoing connections)
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  head_node=${HEAD_NODE:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
  head_port=${HEAD_PORT:-$((12000 + SLURM_JOB_ID % 20000))}
fi

# end_of_job CODE: the end of a job whose step ended with CODE. One that Slurm warned queues itself again, at most
# MAX_REQUEUES (100) times.
end_of_job() {
  if [ "$1" -eq $((128 + $(kill -l USR1))) ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-100}" ]; then
      echo "warned by Slurm: requeued as job $SLURM_JOB_ID" >&2
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # until Slurm ends this run of the job
    fi
    echo "stopped: requeued ${SLURM_RESTART_COUNT:-0} times and not finished; give the job more time, or MAX_REQUEUES" >&2
  fi
  exit "$1"
}
