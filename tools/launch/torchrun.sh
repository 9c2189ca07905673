#!/usr/bin/env bash
# Starts a run with torchrun, on one host, or with the same command on each of several hosts:
#
#   tools/launch/torchrun.sh run full data.root=/data                          all GPUs of this host
#   NPROC=2 tools/launch/torchrun.sh train mae --recipe quickstart             two processes
#   NNODES=4 ENDPOINT=host0:29400 tools/launch/torchrun.sh run full ...        on each of four hosts
#   NNODES=2:4 ENDPOINT=host0:29400 tools/launch/torchrun.sh run full ...      elastic: 2 to 4 hosts
#
# If a process or a host is lost, the remaining hosts restart from the last checkpoint, up to
# MAX_RESTARTS times. The samples in data.blocks must divide by the new number of processes. host0 must
# not fail: it runs the rendezvous. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end with exit
# code 75. To continue, run the same command again.
set -euo pipefail

NNODES=${NNODES:-1}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
MAX_RESTARTS=${MAX_RESTARTS:-3}
# seconds between SIGTERM and SIGKILL, for saving a checkpoint
export TORCHELASTIC_SHUTDOWN_TIMEOUT=${TORCHELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1))}

rendezvous=(--standalone)
if [ "$NNODES" != 1 ]; then
    rendezvous=(--rdzv_backend c10d --rdzv_endpoint "${ENDPOINT:?the first host and a port}")
    rendezvous+=(--rdzv_id "${JOB:-xray}")
    # the name or address at which other hosts reach this host, if it differs from the host name
    [ -z "${ADDRESS:-}" ] || rendezvous+=(--local_addr "$ADDRESS")
fi

signalled=
python -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" "${rendezvous[@]}" \
    --max_restarts "$MAX_RESTARTS" -m xray "$@" &
trap 'signalled=1; kill -TERM $!' TERM INT USR1
code=0
wait $! || code=$?
if [ -n "$signalled" ]; then # the signal ended the first wait, so torchrun's exit code is lost
    wait $! || true
    code=75
fi
exit "$code"
