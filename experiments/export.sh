#!/bin/sh
# What masks are worth in bytes and in milliseconds: stage 4 on the MLP at two shares, on a committed ResNet56 in blocks, on
# VGG16 in blocks (rules.sh), on both in channels (channels.sh), not retrained, and on the files of other programs that
# FILES names, as "resnet56=FILE resnet50=FILE". gpu.sh trains the dense VGG16. Finished runs are skipped. Latency wants an
# idle machine.
set -eu
cd "$(dirname "$0")/../mlp"
python=${PYTHON:-python}
data=${DATA_DIR:-$(dirname "$PWD")/data}
timing="--Threads 1 2 --Seconds ${SECONDS_EACH:-5}"

$python train_stage1.py --Data_dir "$data" --Save_dir exports/mlp_dense
$python pruning_1b.py --data_dir "$data" --weights_dir exports/mlp_dense/0 --key_id 0
for share in 0.962 0.996; do
    $python retrain_stage3.py --Data_dir "$data" --Retrain exports/mlp_dense/0/logits_best.pkl --Prune_per $share \
        --Retrain_mask exports/mlp_dense/0/I_parent_cmi.npy --upper_prune_limit 0.999 --Save_dir exports/mlp
    percent=$(awk "BEGIN {printf \"%.2f\", 100 * $share}")
    $python export_stage4.py --Data_dir "$data" --Checkpoint "exports/mlp/0/logits_$percent.pkl" \
        --Save_dir "exports/mlp_fc2_$percent" $timing
done

export PYTHON=$python DATA_DIR=$data
export_() { # FOLDER CHECKPOINT NAME
    (cd "../$1" && $python export_stage4.py --Data_dir "$data" --Checkpoint "$2" --Save_dir "exports/$3" $timing)
}
pruned() { # FOLDER PERCENT: the checkpoint in a folder of results/ of which so much was asked
    found=$(grep -l "\"requested_percent\": $2" "../results/$1/"logits_*.json)
    echo "$1/$(basename "$found" .json).pkl"
}
export_ resnet56 cifar10_jpeg/resnet56/baseline/0/0/logits_best.pkl resnet56_dense
export_ resnet56 cifar10_before/positions/0_0/0/logits_70.00.pkl resnet56_blocks_70
channels() { # NETWORK PERCENT: of the multiply-adds
    RULES=cmi SHARES=0.$2 ../experiments/channels.sh "$1"
    export_ "$1" "$(pruned "channels/$1/0/cmi/0/0" "$2")" "$1_channels_$2"
}
channels resnet56 50
if [ -f ../results/cifar10_jpeg/vgg16/baseline/0/0/logits_best.pkl ]; then
    NETWORKS=0 SHARES=0.8346 RULES=positions ../experiments/rules.sh vgg16
    export_ vgg16 "$(pruned cifar10_vgg16_before/positions/0_0/0 84.9)" vgg16_blocks_83
    channels vgg16 50
    channels vgg16 70
fi
for given in ${FILES:-}; do
    export_ "${given%%=*}" "${given#*=}" "${given%%=*}_of_another_program"
done
