#!/bin/sh
# Experiment 1 on MNIST: three networks, scored, pruned to three shares by three criteria, retrained.
# Finished runs are skipped, so the script can be stopped and started again. About half an hour on two CPU cores.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python}
seeds="0 1 2"

$python train_stage1.py --Expt_rerun 3
for seed in $seeds; do
    $python pruning_1b.py --weights_dir "mnist_mlp/baseline/$seed" --key_id 0 --split_half
done
for share in 0.962 0.984 0.996; do
    for seed in $seeds; do
        for criterion in cmi random magnitude; do
            $python retrain_stage3.py --Criterion $criterion --Prune_per $share --upper_prune_limit 1 --Seed "$seed" \
                --Retrain "mnist_mlp/baseline/$seed/logits_best.pkl" \
                --Retrain_mask "mnist_mlp/baseline/$seed/I_parent_cmi.npy" \
                --Save_dir "mnist_mlp/$criterion/$seed"
        done
    done
done
