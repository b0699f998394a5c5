#!/usr/bin/env bash
# Runs `jaxlab train` on every worker of a TPU VM or slice, and starts it again while it says "saved" (exit code 75).
#   tpu/run.sh NAME ZONE RUN_DIR [train flags]      e.g. tpu/run.sh mine us-west4-a /mnt/runs/first --mesh data=16
# RUN_DIR must be the same directory on all workers (a mounted bucket or NFS). DRY_RUN=1 prints the commands only.
set -euo pipefail

run() {
  printf '+ %s\n' "$*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

if [ $# -lt 3 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 run_dir=$3
shift 3
root=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT

everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxlab.tar.gz" --zone="$zone" --worker=all
everywhere 'mkdir -p jaxlab-source && tar -xzf jaxlab.tar.gz -C jaxlab-source && python3 -m venv jaxlab-venv &&
  jaxlab-venv/bin/pip install -q -e "jaxlab-source[train]" "jax[tpu]"'

flags=''
if [ $# -gt 0 ]; then flags=$(printf ' %q' "$@"); fi
quoted=$(printf '%q' "$run_dir")
# Every worker loops by itself, because all of them leave with 75 together. A directory with a configuration is a run
# that was begun: it goes on.
everywhere "code=75
while [ \$code -eq 75 ]; do
  code=0
  if [ -e $quoted/config.json ]; then jaxlab-venv/bin/jaxlab train --resume $quoted --grace-seconds 25 || code=\$?
  else jaxlab-venv/bin/jaxlab train$flags --run-dir $quoted --grace-seconds 25 || code=\$?; fi
done
exit \$code"
