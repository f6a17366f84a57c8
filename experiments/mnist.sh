#!/bin/sh
# Experiment 1 on MNIST: networks, scored, pruned to three shares by several rules, retrained. Nothing is chosen: all
# 60,000 images train, the last epoch counts, the test set is read at the end. Finished runs are skipped and killed ones go on,
# so the script can be stopped and started again. A retraining takes about 80 seconds on one CPU core.
set -eu
cd "$(dirname "$0")/../mlp"
python=${PYTHON:-python}
networks=${NETWORKS:-5} # with seeds 0, 1, ...
shares=${SHARES:-0.996 0.984 0.962}
data=${DATA_DIR:-$PWD/../data}
jobs=${JOBS:-1} # retraining runs at a time
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

$python train_stage1.py --Data_dir "$data" --Save_dir mnist_mlp/baseline --Expt_rerun "$networks" --Select last
seeds=$(seq 0 $((networks - 1)))
for seed in $seeds; do
    score="--data_dir $data --weights_dir mnist_mlp/baseline/$seed --key_id 0 --split_half"
    $python pruning_1b.py $score
    $python pruning_1b.py $score --estimator gaussian --given kept --name_postfix forward
done
retrain() { # NAME FAMILY FLAGS: one line per share and seed
    name=$1 family=$2
    shift 2
    for share in $shares; do
        for seed in $seeds; do
            echo "$share $seed $name: $python retrain_stage3.py --Data_dir $data --Select last --Prune_per $share" \
                "--upper_prune_limit 1 --Seed $seed --Retrain mnist_mlp/baseline/$seed/logits_best.pkl" \
                "--Retrain_mask mnist_mlp/baseline/$seed/I_parent_$family.npy --Save_dir mnist_mlp/$name/$seed $*"
        done
    done
}
{
    retrain cmi cmi
    retrain random cmi --Criterion random
    retrain magnitude cmi --Criterion magnitude
    retrain cmi_even cmi --Even --Refit
    retrain random_even cmi --Criterion random --Even --Refit
    retrain magnitude_even cmi --Criterion magnitude --Even --Refit
    retrain cmi-magnitude_even cmi --Criterion cmi-magnitude --Even --Refit
    retrain forward_even forward --Even --Refit
} | sort -s -r -k1,1 | sed 's/^[^:]*: //' | xargs -P "$jobs" -I {} sh -c '{}'
