#!/usr/bin/env bash
# Trains on Slurm, nodes x GPUs, one process per GPU. Submit it from the repository's folder:
#   sbatch [--nodes=2 --time=1-0 ...] launch/slurm.sh --config=FILE:VARIANT --workdir=DIR [--config.x=y ...]
# Everything but --dry-run, which prints the job's commands, goes to main.py. With another number
# of GPUs in a node: sbatch --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh ...
# The folder and the work directory must be ones that all nodes see, or gs://.
#SBATCH --job-name=efae
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# The processes, not this script, get SIGTERM two minutes before the time is over: they save and
# return 75, and this script has the time to put the job back into the queue.
#SBATCH --signal=TERM@120
#
# Why one process per GPU: JAX's detection of Slurm gives every task the GPU of its local number
# (a single task on a node would use the first GPU only), and each process reads and decodes its
# share of the images in a Python of its own. It must not be bound to one GPU by Slurm
# (--gpus-per-task): number 3 is then not there to be taken.
set -euo pipefail
# Slurm runs a copy of this file that lies elsewhere.
if [ -n "${SLURM_JOB_ID:-}" ]; then
  cd "${SLURM_SUBMIT_DIR:-.}"
else
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi
if [ ! -f launch/common.sh ]; then
  echo "error: $PWD is not the repository's folder; run sbatch there" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
source launch/common.sh

arguments=()
for word in "$@"; do
  case "$word" in
    --help | -h) usage launch/slurm.sh ;;
    --dry-run) dry_run=yes ;;
    *) arguments+=("$word") ;;
  esac
done
check_training "${arguments[@]}"
if [ -z "$dry_run" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  mistake "this is no job of Slurm; submit it: $(quoted sbatch launch/slurm.sh "$@")"
fi
gpus=${SLURM_GPUS_ON_NODE:-}
tasks=${SLURM_NTASKS_PER_NODE:-}
if [ -n "$gpus" ] && [ -n "$tasks" ] && [ "$gpus" != "$tasks" ]; then
  mistake "$tasks tasks on $gpus GPUs of a node; give sbatch --gpus-per-node=N --ntasks-per-node=N"
fi

# Here and not where the job is submitted: a login node may have no GPU to install for.
step bash launch/install.sh
# If one process ends, the others may still be saving: they are left alone for five minutes.
# JAX ends those that wait in vain.
launcher=(srun --kill-on-bad-exit=0 --wait=300)
# srun does not take this over from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then launcher+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
code=0
step "${launcher[@]}" .venv/bin/python main.py "${arguments[@]}" || code=$?
if [ -n "$dry_run" ]; then
  echo "# if that returns 75 (stopped by SIGTERM, after saving):"
  echo "scontrol requeue ${SLURM_JOB_ID:-\$SLURM_JOB_ID}"
elif [ "$code" = 75 ]; then
  # A job that scancel ends does not get here: it ends this shell as well.
  echo "stopped after saving; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
