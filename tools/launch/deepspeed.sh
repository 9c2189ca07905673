#!/usr/bin/env bash
# DeepSpeed's own launcher, over ssh (pdsh) to the hosts of a hostfile:
#
#   tools/launch/deepspeed.sh run full data.root=/data                       all GPUs of this host
#   HOSTFILE=hostfile tools/launch/deepspeed.sh run full data.root=/data     see hostfile.example
#   GPUS=2 tools/launch/deepspeed.sh train mae --recipe quickstart           two processes here
#
# The hosts need the same Python in the same place, and out= on a disk that all of them see. Their
# environment is what .deepspeed_env says (NAME=value lines). It restarts nothing; torchrun.sh does.
set -euo pipefail

args=(--no_local_rank)
[ -z "${GPUS:-}" ] || args+=(--num_gpus "$GPUS")
[ -z "${HOSTFILE:-}" ] || args+=(--hostfile "$HOSTFILE")
exec deepspeed "${args[@]}" --module xray "$@"
