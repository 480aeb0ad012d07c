# shellcheck shell=bash
# A lock on a file, to be sourced. `common/locks.py` is the same for Python.

# lock_file FILE [SECONDS]: hold FILE until this script ends, its descriptor is then $lock; fails where another process has it.
#
# flock(1) ends with 1 where another process has the lock. Anything else means that there are no locks here (Lustre mounted
# without -o flock, NFS without its lock service): that is no other process. Elsewhere locks hold on one machine only (Lustre's
# localflock). So the file says who came last: that keeps apart two processes of one machine, and two Slurm jobs.
lock_file() {
  local said status=0 host='' boot='' pid='' start='' job='' me how=(-n)
  [ "$#" -lt 2 ] || how=(-w "$2")
  exec {lock}>>"$1"
  said="$(LC_ALL=C flock "${how[@]}" "$lock" 2>&1)" || status=$? # 0.5 seconds are 0,5 in Germany
  [ "$status" -ne 1 ] || return 1
  read -r host boot pid start job <"$1" || true
  me="$(uname -n) $(</proc/sys/kernel/random/boot_id)"
  if [ "$host $boot" = "$me" ]; then
    if [ "$pid" != "$$" ] && [ -n "$start" ] && [ "$(_started "$pid")" = "$start" ]; then return 1; fi
  elif [ -n "$job" ] && [ "$job" != "${SLURM_JOB_ID-}" ] && [ -n "$(squeue -h -t running,suspended,completing -j "$job" 2>/dev/null)" ]; then
    return 1
  fi
  case "$status" in
    0) : >"$1"; [ -z "${SLURM_JOB_ID-}" ] || echo "$me - - $SLURM_JOB_ID" >"$1" ;; # on this machine the lock itself tells
    *)
      me+=" $$ $(_started "$$") ${SLURM_JOB_ID-}"
      echo "$me" >"$1"
      sleep 0.3 # of two that came at once the last stays
      [ "$(<"$1")" = "$me" ] || return 1
      echo "note: the file system of $(dirname "$1") refuses locks (${said##*: }): nothing will stop a second start on another machine" >&2 ;;
  esac
}

# lock_no_more FILE: it says nothing of who had it any more; the lock itself lasts until this script ends.
lock_no_more() { : >"$1"; }

# _started PID: ticks after boot at which it started; empty where it is gone.
_started() {
  local line fields
  { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -r -a fields <<<"${line##*) }"
  [ "${fields[0]}" = Z ] || echo "${fields[19]}"
}
