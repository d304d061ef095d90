#!/usr/bin/env bash
# A real Slurm of two nodes, n1 and n2, on this one machine and its loopback address, for tests. Run as root; needs
# Debian's slurm-wlm and munge.
#   local_cluster.sh start STATE_DIR    leaves STATE_DIR/slurm.conf: use it as SLURM_CONF
#   local_cluster.sh stop STATE_DIR
set -euo pipefail
state=$2
export SLURM_CONF=$state/slurm.conf

stop() {
  for pidfile in "$state"/*.pid; do
    [ -f "$pidfile" ] && kill "$(cat "$pidfile")" 2>/dev/null || true
  done
}

start() {
  mkdir -p "$state"/{control,n1,n2} /run/munge
  chown munge:munge /run/munge
  # a munge of our own only where none answers: credentials are the machine's
  munge -n >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
  local host
  host=$(hostname -s)
  cat >"$SLURM_CONF" <<CONF
ClusterName=scoring
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1,bf_min_age_reserve=0
MinJobAge=300
JobRequeue=1
MpiDefault=none
SlurmctldPort=16917
StateSaveLocation=$state/control
SlurmctldPidFile=$state/slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdSpoolDir=$state/%n
SlurmdPidFile=$state/slurmd.%n.pid
SlurmdLogFile=$state/slurmd.%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17101 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17102 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  # children of a test must not keep its pipes open
  slurmctld >/dev/null 2>&1
  slurmd -N n1 >/dev/null 2>&1
  slurmd -N n2 >/dev/null 2>&1
  for _ in $(seq 60); do
    [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && return
    sleep 0.5
  done
  echo "the nodes did not become idle: $(sinfo -h 2>&1)" >&2
  return 1
}

case $1 in
start) start ;;
stop) stop ;;
*) echo "expected start or stop, got $1" >&2; exit 2 ;;
esac
