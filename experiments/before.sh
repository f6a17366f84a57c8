#!/bin/sh
# What is left of ResNet56 before any retraining: dense networks x samplings of images x rules x pruned shares, each
# masked, with batch norm recalibrated, and refitted. The dense networks: results/README.md. Finished runs are skipped
# and killed ones go on, so the script can be stopped and started again; `make collect tables` fills the tables.
set -eu
cd "$(dirname "$0")/../resnet56"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}
networks=${NETWORKS:-0 1 2}
samplings=${SAMPLINGS:-0 1 2}
shares=${SHARES:-0.4 0.5 0.7 0.8 0.9} # of the masked layers; 0.4: within the published limits
rules=${RULES:-positions magnitude taylor random means paper}
dense=cifar10_jpeg/resnet56/baseline

scores() { # RULE: flags of stage 2
    case $1 in
    positions) echo --estimator gaussian --given kept --sampling positions --samples_per_class 300 ;;
    means) echo --estimator gaussian --given kept --sampling means --samples_per_class 500 ;;
    paper) echo --estimator kde --sampling means --samples_per_class 500 ;;
    esac
}

for sampling in $samplings; do
    for network in $networks; do
        from=$dense/$network/0 seed=$((10 * network + sampling))
        for rule in $rules; do
            case $rule in
            positions | means | paper)
                $python pruning_1b.py --data_dir "$data" --weights_dir "$from" --name_postfix "${rule}_$sampling" \
                    --key_id all --seed "$seed" $(scores "$rule") ;;
            esac
            for share in $shares; do
                case $rule in
                positions | means | paper) by="--Retrain_mask $from/I_parent_${rule}_$sampling.npy" ;;
                *) by="--Criterion $rule" ;;
                esac
                [ "$share" = 0.4 ] || by="$by --upper_prune_limit 0.97"
                $python retrain_stage3.py --Epoch 0 --Select last --Data_dir "$data" --Retrain "$from/logits_best.pkl" \
                    --Refit --Samples_per_class 100 --Prune_per "$share" --Seed "$seed" $by \
                    --Save_dir "cifar10_before/$rule/${network}_$sampling"
            done
        done
    done
done
