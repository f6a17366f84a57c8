#!/bin/sh
# Experiment 1 on MNIST: three networks, scored, pruned to three shares by three criteria, retrained.
# Nothing is chosen: all 60,000 images train, the last epoch counts, the test set is read once. Finished runs are skipped,
# so the script can be stopped and started again. About half an hour on two CPU cores.
set -eu
cd "$(dirname "$0")/../mlp"
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}
shares=${SHARES:-0.962 0.984 0.996}

$python train_stage1.py --Save_dir mnist_mlp/baseline --Expt_rerun 3 --Select last
for seed in $seeds; do
    $python pruning_1b.py --weights_dir "mnist_mlp/baseline/$seed" --key_id 0 --split_half
done
for share in $shares; do
    for seed in $seeds; do
        for criterion in cmi random magnitude; do
            $python retrain_stage3.py --Criterion $criterion --Prune_per $share --upper_prune_limit 1 --Seed "$seed" --Select last \
                --Retrain "mnist_mlp/baseline/$seed/logits_best.pkl" \
                --Retrain_mask "mnist_mlp/baseline/$seed/I_parent_cmi.npy" \
                --Save_dir "mnist_mlp/$criterion/$seed"
        done
    done
done
