# shellcheck shell=bash
# What every rank's environment must say; the scripts beside this one source it. A variable that is
# set already stays as it is. The reasons stand in docs/launching.md.

# Threads of a rank. torchrun says 1 for several ranks, DeepSpeed's launcher says nothing: each rank
# would then compute with as many threads as the machine has cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Seconds from SIGTERM to SIGKILL: one step, one validation and one save must fit into them.
# torchrun's own are 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

# The network interface of the messages. gloo takes the one that the host's own name leads to, on
# Debian 127.0.1.1, where no other machine is; nccl takes the first that is up. gloo wants the exact
# name, and so does nccl with "=" before it.
if [ -n "${IFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$IFACE}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$IFACE}"
fi

# How long a rank waits for another one's message is no variable: run.timeout_s of the run, or
# init_process_group(timeout=...) of your own program.

# The Python whose torch, deepspeed or accelerate starts the ranks.
PYTHON="${PYTHON:-python}"
