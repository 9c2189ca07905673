#!/usr/bin/env bash
# Starts a run with DeepSpeed's launcher:
#
#   tools/launch/deepspeed.sh run full data.root=/data                       all GPUs of this host
#   GPUS=2 tools/launch/deepspeed.sh train mae --recipe quickstart           two processes on this host
#   HOSTFILE=hostfile tools/launch/deepspeed.sh run full data.root=/data     several hosts, over ssh with pdsh
#   HOSTFILE=hostfile NODE_RANK=1 ENDPOINT=host0:29400 tools/launch/deepspeed.sh ...
#     several hosts, without ssh: run this on each host; NODE_RANK is its line in the hostfile, from 0
#
# hostfile.example shows the format of a hostfile. All hosts need the same Python at the same path, and
# out= must be on a disk that all hosts can access. Over ssh, .deepspeed_env sets environment variables
# on the hosts (NAME=value). This launcher does not restart failed processes; torchrun.sh does.
set -euo pipefail

args=(--no_local_rank)
[ -z "${GPUS:-}" ] || args+=(--num_gpus "$GPUS")
[ -z "${HOSTFILE:-}" ] || args+=(--hostfile "$HOSTFILE")
[ -z "${ENDPOINT:-}" ] || args+=(--master_addr "${ENDPOINT%:*}" --master_port "${ENDPOINT#*:}")
[ -z "${NODE_RANK:-}" ] || args+=(--no_ssh --node_rank "$NODE_RANK")
exec deepspeed "${args[@]}" --module xray "$@"
