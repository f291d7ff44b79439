#!/bin/bash
# GPT-2 124M on 2 nodes of 8 GPUs, started by mpirun: llm.c's scripts/multi_node/run_gpt2_124M_mpi.sh.
#
# This is ../run_gpt2_124M.sh with four times the tokens in an update: 4,716 steps x 2,097,152 = 9.9 billion tokens,
# 7.9e18 FLOPs. Time and loss at this batch size are not known, be it of llm.c or of llmc.
# mpirun tells each process its rank; NCCL moves the gradients. Both nodes see this folder under the same path.
# mpirun passes SIGTERM, SIGINT and SIGUSR1 on, and the run stops with a checkpoint. SIGHUP ends MPICH's mpirun and with
# it the ranks at once: where the terminal may go away, start this with nohup.

hosts=node1:8,node2:8 # with Open MPI; MPICH takes the same list
out_dir=log_gpt2_124M_multi

export NCCL_NET_GDR_LEVEL=2     # GPUs read and write the network card directly, within a PCI host bridge
export NCCL_IB_DISABLE=0        # InfiniBand
export NCCL_SOCKET_IFNAME=ens17 # what NCCL meets over: the name that `ip address` shows
export NCCL_P2P_LEVEL=PXB

exec "$(dirname "$0")/../until_done.sh" "$out_dir" mpirun -np 16 --host "$hosts" python -m llmc.train \
    -i "dev/data/fineweb10B/fineweb_train_*.bin" \
    -j "dev/data/fineweb10B/fineweb_val_*.bin" \
    -o "$out_dir" \
    -e d12 \
    -b 64 -t 1024 -d 2097152 \
    -l 0.0006 -q 0.1 -u 700 -c 0.1 \
    -v 250 -s 20000 -g 144 -h 1 \
    -r 0 -z 1 \
    -n 1000 -y 1 \
    -pi mpi
