#!/bin/bash
# Fine-tuning on several nodes under SLURM; every argument goes to spikelora_finetuning.py:
#
#   sbatch --nodes=2 --gpus-per-node=4 slurm.sh --base_model facebook/opt-350m --data_path yahma/alpaca-cleaned
#
# One launcher on each node starts a process for each of its GPUs, or one on its CPU cores. The folder that it is
# submitted from is this one; base model, data and output have to be where every node finds them.
#SBATCH --job-name=spikelora
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail

GPUS=${SLURM_GPUS_ON_NODE:-0}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node $((GPUS > 0 ? GPUS : 1)) --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d --rdzv_endpoint "$FIRST:$((29500 + SLURM_JOB_ID % 1000))" spikelora_finetuning.py "$@"
