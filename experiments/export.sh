#!/bin/sh
# What masks are worth in bytes and in milliseconds: stage 4 on the MLP at two shares, on a committed ResNet56 in blocks and
# in channels, not retrained, and on the files of other programs that FILES names, as "resnet56=FILE resnet50=FILE".
# Finished runs are skipped. Latency wants an idle machine.
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

NETWORKS=0 SAMPLINGS=0 SHARES=0.7 RULES=positions PYTHON=$python DATA_DIR=$data ../experiments/rules.sh resnet56
cd ../resnet56
dense=cifar10_jpeg/resnet56/baseline/0/0
$python pruning_1b.py --data_dir "$data" --weights_dir $dense --key_id all --granularity channel --name_postfix channels \
    --estimator gaussian --given kept --sampling positions --samples_per_class 300
for criterion in cmi magnitude random; do
    $python retrain_stage3.py --Epoch 0 --Select last --Data_dir "$data" --Retrain $dense/logits_best.pkl --Refit \
        --Samples_per_class 100 --Granularity channel --Prune_per 0.5 --upper_prune_limit 0.97 --Criterion $criterion \
        $([ $criterion = cmi ] && echo "--Retrain_mask $dense/I_parent_channels.npy") --Save_dir "exports/channels_$criterion"
done
export_() { $python export_stage4.py --Data_dir "$data" --Checkpoint "$1" --Save_dir "exports/$2" $timing; }
export_ $dense/logits_best.pkl resnet56_dense
export_ cifar10_before/positions/0_0/0/logits_70.00.pkl resnet56_blocks_70
export_ exports/channels_cmi/0/logits_50.00.pkl resnet56_channels_50

for given in ${FILES:-}; do
    (cd "../${given%%=*}" && export_ "${given#*=}" "${given%%=*}_of_another_program")
done
