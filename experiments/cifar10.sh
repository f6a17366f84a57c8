#!/bin/sh
# Experiment 1 on CIFAR-10, `experiments/cifar10.sh vgg16` or `resnet56`: networks, scored, pruned by three criteria to
# several shares of all weights, retrained. Nothing is chosen: all 50,000 images train, the last epoch counts, the test
# set is read at the end. Finished runs are skipped and killed ones go on, so the script can be stopped and started again.
# The paper's 300 epochs want a GPU: with EPOCHS fewer, learning rates fall in proportion earlier.
set -eu
network=${1:-} legal="vgg16 resnet56"
case " $legal " in *" $network "*) ;; *) echo "cifar10.sh: '$network': legal: $legal" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/../$network"
python=${PYTHON:-python}
epochs=${EPOCHS:-300}
retrain_epochs=${RETRAIN_EPOCHS:-$epochs}
seeds=${SEEDS:-0}
folder=${FOLDER:-cifar10_$network} # below results/
data=${DATA_DIR:-$PWD/../data}
jobs=${JOBS:-1}         # retraining runs at a time; a modern GPU has room for several
flags=${TRAIN_FLAGS:-}  # e.g. --Compile
score=${SCORE_FLAGS:-}  # e.g. --device cuda
case $network in
vgg16) shares=${SHARES:-0.8346 0.90 0.95} masked=0.9823 milestones="90 180 260" retraining="90 180 260" ;;
resnet56) shares=${SHARES:-0.5241 0.5701 0.65 0.75} masked=0.9255 milestones="150 225" retraining="90 180 260" ;;
esac

scaled() { # EPOCHS MILESTONES...: as early in so many epochs as the milestones are in 300
    of=$1 && shift
    for milestone; do echo $((milestone * of >= 300 ? milestone * of / 300 : 1)); done | uniq | tr '\n' ' '
}

common="--Select last $flags"
for seed in $seeds; do
    $python train_stage1.py --Data_dir "$data" $common --Epoch "$epochs" --Milestones $(scaled "$epochs" $milestones) \
        --Seed "$seed" --Save_dir "$folder/baseline/$seed"
    $python pruning_1b.py --data_dir "$data" --weights_dir "$folder/baseline/$seed/0" --key_id all $score
done
for share in $shares; do
    # a layer keeps at least half of what layers keep on average: published limits forbid the published shares
    limit=$(awk "BEGIN {print (1 + $share / $masked) / 2}")
    for seed in $seeds; do
        for criterion in cmi random magnitude; do
            echo "$python retrain_stage3.py --Data_dir \"$data\" $common --Epoch $retrain_epochs" \
                "--Milestones $(scaled "$retrain_epochs" $retraining) --Prune_per $share --Prune_of_network --upper_prune_limit $limit --Criterion $criterion" \
                "--Seed $seed --Retrain $folder/baseline/$seed/0/logits_best.pkl" \
                "--Retrain_mask $folder/baseline/$seed/0/I_parent_cmi.npy --Save_dir $folder/$criterion/$seed"
        done
    done
done | tr '\n' '\0' | xargs -0 -P "$jobs" -n 1 sh -c 'eval "$1" || { echo "FAILED: $1"; exit 1; }' sh
