#!/usr/bin/env bash
# Creates a TPU VM, or asks for one as a queued resource.
#   tpu/create.sh NAME TYPE ZONE [--queued] [--spot]      e.g. tpu/create.sh mine v5litepod-16 us-west4-a --queued
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

run() {
  printf '+ %s\n' "$*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

if [ $# -lt 3 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 type=$2 zone=$3
shift 3
queued='' spot=()
for flag in "$@"; do
  case $flag in
    --queued) queued=1 ;;
    --spot) spot=(--spot) ;;
    *)
      echo "unknown flag $flag: --queued, --spot" >&2
      exit 2
      ;;
  esac
done

# The software version belongs to the kind of chip.
case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  v4-*) version=tpu-ubuntu2204-base ;;
  *)
    echo "unknown TPU type $type: v4-N, v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac

if [ -n "$queued" ]; then
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  echo "asked for; look at it with: gcloud compute tpus queued-resources describe $name --zone=$zone"
else
  run gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" \
    "${spot[@]}"
fi
