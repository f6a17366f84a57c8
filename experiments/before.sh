#!/bin/sh
# What is left of a network before any retraining, `experiments/before.sh resnet56`, `vgg16` or `resnet50`: dense networks
# x samplings of images x rules x pruned shares, each masked, with batch norm recalibrated, and refitted. The dense
# networks: results/README.md. Finished runs are skipped and killed ones go on, so the script can be stopped and started
# again; `make collect tables` fills the tables.
set -eu
network=$1
cd "$(dirname "$0")/../$network"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}
samplings=${SAMPLINGS:-0 1 2}
rules=${RULES:-positions magnitude taylor random means paper}
# published: the shares within the published limits of layers; the others have looser ones
case $network in
resnet56) dense=cifar10_jpeg/resnet56/baseline folder=cifar10_before
    networks=${NETWORKS:-0 1 2} shares=${SHARES:-0.4 0.5 0.7 0.8 0.9} published=0.4 of= # the masked layers
    positions="--samples_per_class 300" means="--samples_per_class 500" calibration=100 ;;
vgg16) dense=cifar10_jpeg/vgg16/baseline folder=cifar10_vgg16_before
    networks=${NETWORKS:-0} shares=${SHARES:-0.8346 0.95} published= of=--Prune_of_network
    positions="--samples_per_class 300" means="--samples_per_class 500" calibration=100 ;;
resnet50) dense=imagenet_before/dense folder=imagenet_before
    networks=${NETWORKS:-0} shares=${SHARES:-0.4301 0.49 0.65} published="0.4301 0.49" of=--Prune_of_network
    positions="--samples_per_class 1 --positions 3" means="--samples_per_class 1" calibration=1 ;;
esac

scores() { # RULE: flags of stage 2
    case $1 in
    positions) echo --estimator gaussian --given kept --sampling positions $positions ;;
    means) echo --estimator gaussian --given kept --sampling means $means ;;
    paper) echo --estimator kde --sampling means $means ;;
    esac
}

for sampling in $samplings; do
    for number in $networks; do
        from=$dense/$number/0 seed=$((10 * number + sampling))
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
                case " $published " in *" $share "*) ;; *) by="$by --upper_prune_limit 0.97" ;; esac
                $python retrain_stage3.py --Epoch 0 --Select last --Data_dir "$data" --Retrain "$from/logits_best.pkl" \
                    --Refit --Samples_per_class $calibration --Prune_per "$share" $of --Seed "$seed" $by \
                    --Save_dir "$folder/$rule/${number}_$sampling"
            done
        done
    done
done
