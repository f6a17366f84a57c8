#!/bin/sh
# The reference way to a network's best result, `experiments/best.sh mlp`, `resnet56`, `vgg16` or `resnet50`: the three
# stages with the flags of the best rule by scores in the tables of results/README.md.
#   mlp       98.47 ± 0.08 % with 96.2 % of fc2 pruned (n = 5); some four minutes of one core
#   resnet56  88.57 % with 50 % of the masked layers pruned and nothing retrained, from the committed dense network of
#             90.03 % for JPEG-coded CIFAR-10; some six minutes of one core
#   vgg16, resnet50    the rule of resnet56; measured on other dense networks than stage 1 makes here, by rules.sh
# Finished stages are skipped and killed ones go on. DENSE: a folder below results/ with a dense network, none to train
# one; SHARE: what is pruned; RETRAIN_EPOCHS; TRAIN_FLAGS, SCORE_FLAGS, PRUNE_FLAGS: further flags of the stages.
set -eu
network=${1:-} legal="mlp resnet56 vgg16 resnet50"
case " $legal " in *" $network "*) ;; *) echo "best.sh: '$network': legal: $legal" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/../$network"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}
folder=${FOLDER:-best/$network} # below results/
positions="--key_id all --estimator gaussian --given kept --sampling positions"
retraining="--Schedule one-cycle --Warm_up 0.1 --Lr 0.05 --Weight_decay 5e-4"
dense= of= train= epochs=0 limit=0.97
case $network in
mlp) share=0.962 limit=1 epochs=30 retraining=--Even
    score="--key_id 0 --estimator gaussian --given kept --grouping correlation" calibration= ;;
resnet56) share=0.5 dense=cifar10_jpeg/resnet56/baseline/1/0
    score="$positions --samples_per_class 300" calibration="--Samples_per_class 100" ;;
vgg16) share=0.8346 of=--Prune_of_network
    score="$positions --samples_per_class 300" calibration="--Samples_per_class 100" ;;
resnet50) share=0.4301 of=--Prune_of_network limit=0.55 train="--Weights torchvision"
    score="$positions --samples_per_class 1 --positions 3" calibration="--Samples_per_class 1" ;;
esac
dense=${DENSE-$dense}

if [ -z "$dense" ]; then
    $python train_stage1.py --Data_dir "$data" --Select last $train ${TRAIN_FLAGS:-} --Save_dir "$folder/dense"
    dense=$folder/dense/0
fi
$python pruning_1b.py --data_dir "$data" --weights_dir "$dense" --name_postfix best $score ${SCORE_FLAGS:-}
$python retrain_stage3.py --Data_dir "$data" --Select last --Epoch "${RETRAIN_EPOCHS:-$epochs}" $retraining \
    --Refit $calibration --Prune_per "${SHARE:-$share}" $of --upper_prune_limit $limit --Retrain "$dense/logits_best.pkl" \
    --Retrain_mask "$dense/I_parent_best.npy" --Save_dir "$folder/pruned" ${PRUNE_FLAGS:-}
