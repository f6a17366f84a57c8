#!/bin/sh
# What wants a GPU, in one command: training speed, then Experiment 1 on CIFAR-10 for both networks. Takes the same
# settings as cifar10.sh from the environment (EPOCHS, SEEDS, SHARES, DATA_DIR, JOBS, ...). Records go to results/.
# A rehearsal on a CPU: EPOCHS=1 STEPS=2 SHARES=0.5 FOLDER=rehearsal SCORE_FLAGS="--estimator gaussian" experiments/gpu.sh
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" DATA_DIR="${DATA_DIR:-$PWD/data}" JOBS="${JOBS:-4}"
export SCORE_FLAGS="${SCORE_FLAGS---device cuda}"
$PYTHON benchmarks/epochs.py --Data_dir "$DATA_DIR" --steps "${STEPS:-100}"
for network in vgg16 resnet56; do
    FOLDER="${FOLDER:+$FOLDER/$network}" experiments/cifar10.sh $network
done
