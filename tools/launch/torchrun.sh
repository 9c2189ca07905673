#!/usr/bin/env bash
# One host, or the same command on each of several:
#
#   tools/launch/torchrun.sh run full data.root=/data                          all GPUs of this host
#   NPROC=2 tools/launch/torchrun.sh train mae --recipe quickstart             two processes
#   NNODES=4 ENDPOINT=host0:29400 tools/launch/torchrun.sh run full ...        on each of four hosts
#   NNODES=2:4 ENDPOINT=host0:29400 tools/launch/torchrun.sh run full ...      elastic: two will do
#
# When a process or a host is lost, those that are left start again from the last checkpoint, up to
# MAX_RESTARTS times; data.blocks have to divide over them. host0 must live: it is where they meet.
# SIGTERM, SIGUSR1 and Ctrl-C save; exit code 75 then asks to run the same command again.
set -euo pipefail

NNODES=${NNODES:-1}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
MAX_RESTARTS=${MAX_RESTARTS:-3}
# seconds to save after a SIGTERM, before what is left is killed
export TORCHELASTIC_SHUTDOWN_TIMEOUT=${TORCHELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1))}

meet=(--standalone)
if [ "$NNODES" != 1 ]; then
    meet=(--rdzv_backend c10d --rdzv_endpoint "${ENDPOINT:?the first host and a port}")
    meet+=(--rdzv_id "${JOB:-xray}")
    # this host's name or address as others reach it, where its host name is not that
    [ -z "${ADDRESS:-}" ] || meet+=(--local_addr "$ADDRESS")
fi

told=
python -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" "${meet[@]}" \
    --max_restarts "$MAX_RESTARTS" -m xray "$@" &
trap 'told=1; kill -TERM $!' TERM INT USR1
code=0
wait $! || code=$?
if [ -n "$told" ]; then # it was the signal that ended that wait; torchrun's own exit code is lost
    wait $! || true
    code=75
fi
exit "$code"
