#!/bin/sh
# Whole channels by scores and by two controls, `experiments/channels.sh vgg16` or `resnet56`: SHARES (half) of the masked
# layers' multiply-adds pruned, batch norm recalibrated, refitted, then retrained for EPOCHS (0: not at all). RULES may
# also hold magnitude-shares and random-shares: every layer's share by the scores. Dense networks: results/README.md.
# Finished runs are skipped and killed ones go on.
set -eu
network=${1:-} legal="vgg16 resnet56"
case " $legal " in *" $network "*) ;; *) echo "channels.sh: '$network': legal: $legal" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/../$network"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}
epochs=${EPOCHS:-0}
for number in ${NETWORKS:-0}; do
    dense=cifar10_jpeg/$network/baseline/$number/0 seed=$((10 * number))
    $python pruning_1b.py --data_dir "$data" --weights_dir "$dense" --name_postfix channels --key_id all --seed $seed \
        --granularity channel --estimator gaussian --given kept --sampling positions --samples_per_class 300 ${SCORE_FLAGS:-}
    for share in ${SHARES:-0.5}; do
        for rule in ${RULES:-cmi magnitude random}; do
            case $rule in cmi | *-shares) scores="--Retrain_mask $dense/I_parent_channels.npy" ;; *) scores= ;; esac
            $python retrain_stage3.py --Epoch "$epochs" --Schedule one-cycle --Warm_up 0.1 --Lr 0.05 --Weight_decay 5e-4 \
                --Select last --Data_dir "$data" ${TRAIN_FLAGS:-} --Retrain "$dense/logits_best.pkl" --Refit \
                --Granularity channel --Samples_per_class 100 --Prune_of macs --Prune_per "$share" --upper_prune_limit 0.97 \
                --Criterion "${rule%-shares}" --Seed $seed --Save_dir "channels/$network/$epochs/$rule/$number" $scores
        done
    done
done
