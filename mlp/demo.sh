#!/bin/sh
# The three stages on scikit-learn's digits, with CMI and with both controls; a minute and a half on two CPU cores.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python}
train="--Dataset DIGITS --Val_size 200 --Batch_size 128 --Epoch 20 --Milestones 10 15 --Expt_rerun 3 --Samples_per_class 110"
groups="--parent_clusters 125 --children_clusters 75"

$python train_stage1.py --Dataset DIGITS --Val_size 200 --Batch_size 64 --Save_dir demo/baseline
$python pruning_1b.py --dataset DIGITS --weights_dir demo/baseline/0 --key_id 0 --samples_per_class 110 $groups --split_half
for key_id in 0 1 2; do
    for criterion in cmi random magnitude; do
        $python retrain_stage3.py $train $groups --Criterion $criterion --Retrain demo/baseline/0/logits_best.pkl \
            --Retrain_mask demo/baseline/0/I_parent_cmi.npy --Save_dir "demo/$criterion" --upper_prune_limit 1 \
            --lower_prune_per 0.90 --upper_prune_per 0.98 --prune_per_step 0.04 --key_id $key_id
    done
done
$python ../experiments/report.py ../results/demo && $python ../experiments/figures.py ../results/demo
