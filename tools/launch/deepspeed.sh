#!/usr/bin/env bash
# DeepSpeed's own launcher:
#
#   tools/launch/deepspeed.sh run full data.root=/data                       all GPUs of this host
#   GPUS=2 tools/launch/deepspeed.sh train mae --recipe quickstart           two processes here
#   HOSTFILE=hostfile tools/launch/deepspeed.sh run full data.root=/data     over ssh, with pdsh
#   HOSTFILE=hostfile NODE_RANK=1 ENDPOINT=host0:29400 tools/launch/deepspeed.sh ...
#                                            without ssh: on each host, with its line in the hostfile
#
# The hosts of a hostfile (see hostfile.example) need the same Python in the same place, and out= on
# a disk that all of them see; over ssh their environment is what .deepspeed_env says (NAME=value).
# It restarts nothing; torchrun.sh does.
set -euo pipefail

args=(--no_local_rank)
[ -z "${GPUS:-}" ] || args+=(--num_gpus "$GPUS")
[ -z "${HOSTFILE:-}" ] || args+=(--hostfile "$HOSTFILE")
[ -z "${ENDPOINT:-}" ] || args+=(--master_addr "${ENDPOINT%:*}" --master_port "${ENDPOINT#*:}")
[ -z "${NODE_RANK:-}" ] || args+=(--no_ssh --node_rank "$NODE_RANK")
exec deepspeed "${args[@]}" --module xray "$@"
