#!/usr/bin/env bash
# A Slurm cluster of virtual nodes on this machine, for tests: real slurmctld, slurmd and munged. Each node has a host name,
# processes and /dev/shm of its own, and shares the files; their network has a loopback and nothing else. GPUs are counted only:
# CUDA_VISIBLE_DEVICES is set, no device is there. Needs Linux, root, iproute2 and slurmctld, slurmd, slurm-client, munge.
#
#   bash tests/loop/slurm.sh start DIR [NODES] [GPUS]    takes about a second
#   bash tests/loop/slurm.sh run DIR COMMAND…            on the login node: sbatch, squeue, salloc …
#   bash tests/loop/slurm.sh node DIR K COMMAND…         on node K, outside of any job
#   bash tests/loop/slurm.sh kill DIR K                  node K loses its power, with all that runs there …
#   bash tests/loop/slurm.sh boot DIR K                  … and comes back
#   bash tests/loop/slurm.sh stop DIR

set -euo pipefail
action="$1" dir="$(mkdir -p "$2" && cd "$2" && pwd -P)"
export SLURM_CONF="$dir/slurm.conf"

login() { nsenter --target "$(<"$dir/login.pid")" --net --uts --mount --wd="$PWD" "$@"; }

wait_for() { # SECONDS COMMAND…: until it succeeds
  local k
  for ((k = 0; k < $1 * 10; k++)); do
    ! "${@:2}" 2>/dev/null || return 0
    sleep 0.1
  done
  echo "error: waited in vain for: ${*:2}; logs: $dir/log" >&2
  exit 1
}

slurmd_of() { # ANCESTOR FILE: the process number of its slurmd, into the file
  local pid="$1" child name
  while child="$(pgrep -P "$pid")"; do pid="${child%%$'\n'*}"; done
  { read -r name <"/proc/$pid/comm"; } && [ "$name" = slurmd ] && echo "$pid" >"$2" # $(<FILE) would end the script without one
}

boot() { # K: the node's first process is slurmd's; when it is killed, all of the node is gone
  # shellcheck disable=SC2016 # for the node's shell
  login unshare --uts --pid --mount --fork --kill-child --mount-proc setsid bash -c '
    hostname "$1" && mount -t tmpfs tmpfs /dev/shm && exec slurmd -D -c -N "$1"' boot "n$1" \
    </dev/null >"$dir/log/boot.n$1" 2>&1 &
  wait_for 5 slurmd_of "$!" "$dir/n$1.pid"
}

configure() { # NODES GPUS
  local k
  for ((k = 1; k <= $1; k++)); do echo "10.77.0.$((k + 1)) n$k"; done | cat - <(printf '127.0.0.1 localhost\n10.77.0.1 login\n') >"$dir/hosts"
  printf 'AutoDetect=off\nName=gpu File=/dev/tty[10-%d]\n' "$((9 + $2))" >"$dir/gres.conf" # any device files will do
  echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=virtual
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdPidFile=$dir/%n.slurmd.pid
SlurmdLogFile=$dir/log/%n
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
GresTypes=gpu
$(for ((k = 1; k <= $1; k++)); do echo "NodeName=n$k NodeAddr=10.77.0.$((k + 1)) Port=$((26900 + k)) CPUs=$(nproc --all) RealMemory=8000 Gres=gpu:$2"; done)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
}

all_idle() { [ "$(login sinfo -h -p all -t idle -o %D)" = "$1" ]; } # NODES

case "$action" in
  run) login "${@:3}" ;;
  node) nsenter --target "$(<"$dir/n$3.pid")" --net --uts --mount --pid --wd="$PWD" "${@:4}" ;;
  kill) kill -KILL "$(<"$dir/n$3.pid")" ;;
  boot) boot "$3" ;;
  stop)
    for file in "$dir"/n*.pid "$dir/slurmctld.pid" "$dir/munge/pid" "$dir/login.pid"; do
      [ ! -s "$file" ] || kill -KILL "$(<"$file")" 2>/dev/null || true
    done ;;
  start)
    nodes="${3:-2}" gpus="${4:-1}"
    mkdir -p "$dir"/{state,log,munge}
    for ((k = 1; k <= nodes; k++)); do mkdir -p "$dir/spool/n$k"; done
    chmod 700 "$dir/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    configure "$nodes" "$gpus"
    # glibc looks no name up where 127.0.0.1 is the only address, so each node has another one.
    # shellcheck disable=SC2016
    unshare --net --uts --mount setsid bash -c '
      hostname login && mount --bind "$1/hosts" /etc/hosts && ip link set lo up
      for ((k = 1; k <= $2; k++)); do ip addr add "10.77.0.$k/24" dev lo; done
      echo $$ >"$1/login.pid"; exec sleep infinity' login "$dir" "$((nodes + 1))" </dev/null >"$dir/log/login" 2>&1 &
    wait_for 5 test -s "$dir/login.pid"
    login munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
      --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    login slurmctld -c
    for ((k = 1; k <= nodes; k++)); do boot "$k"; done
    wait_for 20 all_idle "$nodes" ;;
  *) echo "error: unknown action $action" >&2; exit 2 ;;
esac
