#!/bin/sh
# Rules against each other on one of the convolutional networks, `experiments/rules.sh resnet56`, `vgg16` or `resnet50`:
# dense networks x samplings of images x rules x pruned shares, each masked, with batch norm recalibrated, and refitted,
# and then retrained for EPOCHS (0: not at all) at a learning rate that falls from RATE (0.05), or by the dense network's
# answers too (DISTILLATION, a share of the loss). The dense networks: results/README.md. Finished runs are skipped and
# killed ones go on, so the script can be stopped and started again; `make collect tables` fills the tables.
# SHARES=none: scores only.
set -eu
network=${1:-} legal="resnet56 vgg16 resnet50"
case " $legal " in *" $network "*) ;; *) echo "rules.sh: '$network': legal: $legal" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/../$network"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}
epochs=${EPOCHS:-0}
# tight: the shares that the published limits of layers allow; the others have looser ones
case $network in
resnet56) dense=cifar10_jpeg/resnet56/baseline folder=cifar10 networks="0 1 2" calibration=100
    positions="--samples_per_class 300" means="--samples_per_class 500"
    shares="0.4 0.5 0.7 0.8 0.9" tight=0.4 of= ;; # of the masked layers
vgg16) dense=cifar10_jpeg/vgg16/baseline folder=cifar10_vgg16 networks="0 1 2" calibration=100
    positions="--samples_per_class 300" means="--samples_per_class 500"
    shares="0.8346 0.95" tight= of=--Prune_of_network ;;
resnet50) dense=imagenet_before/dense folder=imagenet networks=0 calibration=1
    positions="--samples_per_class 1 --positions 3" means="--samples_per_class 1"
    shares="0.4301 0.49 0.65" tight="0.4301 0.49" of=--Prune_of_network ;;
esac
if [ "$epochs" = 0 ]; then
    folder=${folder}_before rules="positions magnitude taylor random means paper" recipe=
else # beside the dense network, retrained alike
    rules="dense positions magnitude random paper"
    recipe="--Schedule one-cycle --Warm_up 0.1 --Lr ${RATE:-0.05} --Weight_decay 5e-4"
    if [ -n "${DISTILLATION:-}" ]; then
        folder=${folder}_distilled/$epochs recipe="$recipe --Distillation $DISTILLATION"
    elif [ -n "${RATE:-}" ]; then
        folder=${folder}_rates/$RATE
    else
        folder=${folder}_retrained/$epochs
    fi
    [ "$network" = resnet50 ] || shares="0.5241 0.75 0.83" tight= of=--Prune_of_network
    [ "$network" = vgg16 ] && shares="0.8346 0.95"
fi

scores() { # RULE: flags of stage 2
    case $1 in
    positions) echo --estimator gaussian --given kept --sampling positions $positions ;;
    means) echo --estimator gaussian --given kept --sampling means $means ;;
    paper) echo --estimator kde --sampling means $means ;;
    esac
}

for sampling in ${SAMPLINGS:-0}; do # more than one are no more networks, though a t-test over runs counts them so
    for number in ${NETWORKS:-$networks}; do
        from=$dense/$number/0 seed=$((10 * number + sampling))
        for rule in ${RULES:-$rules}; do
            case $rule in
            positions | means | paper)
                $python pruning_1b.py --data_dir "$data" --weights_dir "$from" --name_postfix "${rule}_$sampling" \
                    --key_id all --seed "$seed" $(scores "$rule") ${SCORE_FLAGS:-}
                by="--Refit --Retrain_mask $from/I_parent_${rule}_$sampling.npy" ;;
            dense) by="--Criterion magnitude" ;;
            *) by="--Refit --Criterion $rule" ;;
            esac
            for share in $([ "$rule" = dense ] && echo 0 || echo "${SHARES:-$shares}"); do
                [ "$share" = none ] && continue
                case " $tight " in *" $share "*) limit= ;; *) limit="--upper_prune_limit 0.97" ;; esac
                $python retrain_stage3.py --Epoch "$epochs" $recipe --Select last --Data_dir "$data" ${TRAIN_FLAGS:-} \
                    --Retrain "$from/logits_best.pkl" $by --Samples_per_class $calibration --Prune_per "$share" $of \
                    $limit --Seed "$seed" --Save_dir "$folder/$rule/${number}_$sampling"
            done
        done
    done
done
