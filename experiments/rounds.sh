#!/bin/sh
# Scores made again after every round of pruning, `experiments/rounds.sh resnet56`: each share starts from the network of
# the share before, refitted and scored anew, with no training between; beside magnitude in the same rounds. What is
# pruned at once is in `experiments/rules.sh`, and so are the variables. Finished rounds are skipped.
set -eu
[ "${1:-}" = resnet56 ] || { echo "rounds.sh: '${1:-}': legal: resnet56" >&2 && exit 2; }
cd "$(dirname "$0")/../resnet56"
python=${PYTHON:-python}
data=${DATA_DIR:-$PWD/../data}

for number in ${NETWORKS:-0 1 2}; do
    for rule in ${RULES:-positions magnitude}; do
        from=cifar10_jpeg/resnet56/baseline/$number/0 file=logits_best.pkl by="--Criterion $rule"
        for share in ${SHARES:-0.5 0.7 0.8 0.9}; do
            if [ "$rule" = positions ]; then
                $python pruning_1b.py --data_dir "$data" --weights_dir "$from" --weights_file "$file" --key_id all \
                    --name_postfix "round_$share" --seed $((10 * number)) --samples_per_class 300 \
                    --estimator gaussian --given kept --sampling positions
                by="--Retrain_mask $from/I_parent_round_$share.npy"
            fi
            $python retrain_stage3.py --Epoch 0 --Select last --Data_dir "$data" --Retrain "$from/$file" --Refit $by \
                --Samples_per_class 100 --Prune_per "$share" --upper_prune_limit 0.97 --Seed $((10 * number)) \
                --Save_dir "cifar10_before/${rule}_rounds/$number/$share"
            from=cifar10_before/${rule}_rounds/$number/$share/0 file=logits_$(echo "$share" | awk '{ printf "%.2f", 100 * $1 }').pkl
        done
    done
done
