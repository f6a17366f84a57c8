#!/bin/sh
# The experiments on MNIST: networks, scored, pruned by several rules, retrained. Nothing is chosen: all 60,000 images
# train, the last epoch counts, the test set is read at the end ("validated": 3,000 images choose the epoch). Finished
# runs are skipped and killed ones go on, so the script can be stopped and started again. A retraining takes about 80
# seconds on one CPU core, half with TRAIN_FLAGS=--Amp where the processor has bfloat16.
#
#   experiments/mnist.sh [EXPERIMENT ...]           by default all, see below
#   LIST=1 experiments/mnist.sh [EXPERIMENT ...]    prints the commands of the pruned runs, one per line
set -eu
cd "$(dirname "$0")/../mlp"
python=${PYTHON:-python}
networks=${NETWORKS:-5} # with seeds 0, 1, ...
shares=${SHARES:-0.996 0.984 0.962}
data=${DATA_DIR:-$PWD/../data}
jobs=${JOBS:-1} # retraining runs at a time
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
seeds=${SEEDS:-$(seq 0 $((networks - 1)))} # the networks to prune
base=mnist_mlp/baseline inner= checkpoint=logits_best.pkl # a network is $base/<seed>$inner/$checkpoint
select=last held= # the images that choose, if not model.py's 3,000

dense() { # the networks
    $python train_stage1.py --Data_dir "$data" --Save_dir $base --Expt_rerun "$networks" --Select $select $held
}
score() { # POSTFIX FLAGS: the scores of all networks
    postfix=$1
    shift
    for seed in $seeds; do
        $python pruning_1b.py --data_dir "$data" --weights_dir "$base/$seed$inner" --name_postfix "$postfix" "$@"
    done
}
prune() { # NAME FLAGS: one line per network; in the flags, @FAMILY names its scores
    name=$1
    shift
    for seed in $seeds; do
        network=$base/$seed$inner
        flags=$(echo "$*" | sed "s|@\([^ ]*\)|--Retrain_mask $network/I_parent_\1.npy|")
        echo "$python retrain_stage3.py --Data_dir \"$data\" --Select $select $held --Seed $seed --Retrain $network/$checkpoint" \
            "--upper_prune_limit 1 --Save_dir $name/$seed $flags ${TRAIN_FLAGS:-}"
    done
}

run() { # the lines of standard input
    tr '\n' '\0' | xargs -0 -P "$jobs" -n 1 sh -c 'eval "$1"' sh
}

# Experiment 1: fc2 pruned in 250 x 100 groups.
fc2_scores() {
    score cmi --key_id 0 --split_half
    score kept --key_id 0 --estimator gaussian --given kept
    score correlated --key_id 0 --estimator gaussian --given kept --grouping correlation
}
fc2_runs() {
    for share in $shares; do
        prune mnist_mlp/correlated_even @correlated --Prune_per "$share" --Even --Refit
        prune mnist_mlp/kept-magnitude_even @kept --Criterion cmi-magnitude --Prune_per "$share" --Even --Refit
        prune mnist_mlp/cmi_even @cmi --Prune_per "$share" --Even --Refit
        prune mnist_mlp/magnitude_even @cmi --Criterion magnitude --Prune_per "$share" --Even --Refit
        prune mnist_mlp/random_even @cmi --Criterion random --Prune_per "$share" --Even --Refit
        prune mnist_mlp/cmi @cmi --Prune_per "$share" --no-Even --no-Refit
        prune mnist_mlp/magnitude @cmi --Criterion magnitude --Prune_per "$share" --no-Even --no-Refit
        prune mnist_mlp/random @cmi --Criterion random --Prune_per "$share" --no-Even --no-Refit
    done
    most=${shares%% *} # what else was tried, at the largest share only
    prune mnist_mlp/correlated_spread @correlated --Prune_per "$most" --Even --no-Refit
    prune mnist_mlp/random_correlated_even @correlated --Criterion random --Prune_per "$most" --Even --Refit
    prune mnist_mlp/magnitude_correlated_even @correlated --Criterion magnitude --Prune_per "$most" --Even --Refit
    prune mnist_mlp/kept_even @kept --Prune_per "$most" --Even --Refit
}

# fc2 again, the best rule and its controls: the networks that experiments/robustness.sh attacks. Some are committed.
robustness_scores() {
    score correlated --key_id 0 --estimator gaussian --given kept --grouping correlation
}
robustness_runs() {
    for share in $shares; do
        prune robustness/correlated_even @correlated --Prune_per "$share" --Even --Refit
        prune robustness/magnitude_even --Criterion magnitude --Prune_per "$share" --Even --Refit
        prune robustness/random_even --Criterion random --Prune_per "$share" --Even --Refit
    done
}

# fc2 again; 3,000 images that are held out of all training choose the epochs, how many there are and how weights decay.
validated_scores() {
    score cmi --key_id 0
}
validated_runs() {
    prune mnist_validated/cmi_0.0001 @cmi --Prune_per 0.975 --Even --Refit
    prune mnist_validated/cmi_0.0005 @cmi --Prune_per 0.975 --Even --Refit --Weight_decay 0.0005
    prune mnist_validated/cmi_long @cmi --Prune_per 0.975 --Even --Refit --Epoch 60 --Milestones 20 40
}

# fc2 again, retrained for three epochs at a tenth of the learning rate.
short_scores() {
    fc2_scores
}
short_runs() {
    for share in $shares; do
        short="--Prune_per $share --Epoch 3 --Lr 0.01 --Milestones 2"
        prune mnist_short/correlated_even @correlated "$short" --Even --Refit
        prune mnist_short/kept-magnitude_even @kept "$short" --Criterion cmi-magnitude --Even --Refit
        prune mnist_short/cmi @cmi "$short" --no-Even --no-Refit
        for criterion in magnitude random; do
            prune mnist_short/${criterion}_even @cmi "$short" --Criterion $criterion --Even --Refit
            prune mnist_short/$criterion @cmi "$short" --Criterion $criterion --no-Even --no-Refit
        done
    done
}

# All three layers, 98.5 % of all weights, in blocks of 5 or 6 weights.
all="--children_key fc1.weight fc2.weight final.weight --Prune_per 0.985 --Prune_of_network --no-Even"
alone="--parent_clusters 784 500 300 --children_clusters 500 300 10"
singles="--key_id all --estimator gaussian --given kept
    --parent_clusters 500 300 784 --children_clusters 300 10 500" # in the order of the pairs of stage 2
network_scores() {
    score cmi --key_id 0 --split_half
    for pair in 1 2; do score cmi --key_id $pair; done
    score kept --key_id all --estimator gaussian --given kept
}
network_runs() {
    prune mnist_network/kept-magnitude_masked @kept "$all" --Criterion cmi-magnitude --no-Refit
    prune mnist_network/kept_masked @kept "$all" --no-Refit
    prune mnist_network/magnitude "$all" --Criterion magnitude --no-Refit
    prune mnist_network/random "$all" --Criterion random --no-Refit
    prune mnist_network/magnitude_shares @kept "$all" --Criterion magnitude --Refit
    prune mnist_network/random_shares @kept "$all" --Criterion random --Refit
    prune mnist_network/cmi @cmi "$all" --no-Refit
    prune mnist_network/kept-magnitude @kept "$all" --Criterion cmi-magnitude --Refit
    prune mnist_network/kept @kept "$all" --Refit
    prune mnist_network/magnitude_refit "$all" --Criterion magnitude --Refit
}

# The same, weight by weight, on the networks of Experiment 2.
weights_scores() {
    score single $singles
}
weights_runs() {
    prune mnist_weights/kept-magnitude @single "$all" "$alone" --Criterion cmi-magnitude --Refit
    prune mnist_weights/magnitude "$all" "$alone" --Criterion magnitude --no-Refit
    prune mnist_weights/kept @single "$all" "$alone" --Refit
    prune mnist_weights/magnitude_refit "$all" "$alone" --Criterion magnitude --Refit
    prune mnist_weights/random "$all" "$alone" --Criterion random --no-Refit
}

# Weight by weight again; 3,000 images that are held out of all training choose how to retrain. The dropout rate shrinks
# like the square root of the share that is kept: .2 sqrt(.015) = .02 (Han et al., NeurIPS 2015, section 3.2).
weights_validated_scores() {
    weights_scores
}
weights_validated_runs() {
    ours="$all $alone --Criterion cmi-magnitude --Refit"
    for dropout in 0.02 0.2; do
        prune mnist_weights_validated/30_$dropout @single "$ours" --Dropout $dropout
    done
    for dropout in 0.02 0.1 0.2; do
        prune mnist_weights_validated/60_$dropout @single "$ours" --Dropout $dropout --Epoch 60 --Milestones 20 40
    done
}

# Weight by weight, retrained as the held-out images choose; at once, and in two rounds, the first to 95 %.
long="--Epoch 60 --Milestones 20 40 --Dropout 0.02"
weights_long_scores() {
    weights_scores
}
weights_long_runs() {
    prune mnist_weights_long/kept-magnitude @single "$all" "$alone" "$long" --Criterion cmi-magnitude --Refit
    prune mnist_weights_long/magnitude "$all" "$alone" "$long" --Criterion magnitude --no-Refit
}
weights_rounds_scores() {
    both mnist_weights_rounds/first 0.95 | run
}
weights_rounds_runs() {
    both mnist_weights_rounds 0.985 "$long" mnist_weights_rounds/first/logits_95.00.pkl
}
both() { # NAME SHARE [FLAGS [ROUND/CHECKPOINT]]: a round by each rule, on what it left in ROUND, without one on the dense
    for rule in kept-magnitude magnitude; do
        (
            [ -z "${4:-}" ] || base=${4%/*}/$rule inner=/0 checkpoint=${4##*/}
            case $rule in
            kept-magnitude)
                [ -n "${LIST:-}" ] || score single ${4:+--weights_file "$checkpoint"} $singles >&2
                by="@single --Criterion cmi-magnitude --Refit" ;;
            magnitude) by="--Criterion magnitude --no-Refit" ;;
            esac
            prune "$1/$rule" "$by $all $alone --Prune_per $2 ${3:-}"
        )
    done
}

# A third round, to as few weights as Sparse VD leaves of LeNet-300-100: 266,200 / 68 = 3,915 of the 545,000 here.
weights_few_scores() {
    weights_rounds_scores
    weights_rounds_runs | run
}
weights_few_runs() {
    both mnist_weights_few 0.992817 "$long" mnist_weights_rounds/logits_98.50.pkl
}

# As few weights, taught by the network before (--Distillation); 10,000 images that are held out of all training choose
# how much.
weights_few_validated_scores() {
    for taught in 0 0.9; do
        rounds=mnist_weights_few_validated/$taught flags="--Distillation $taught"
        both $rounds/first 0.95 "$flags" | run
        both $rounds/second 0.985 "$long $flags" $rounds/first/logits_95.00.pkl | run
    done
}
weights_few_validated_runs() {
    for taught in 0 0.9; do
        rounds=mnist_weights_few_validated/$taught
        both $rounds/third 0.992817 "$long --Distillation $taught" $rounds/second/logits_98.50.pkl
    done
}

# Experiment 2: other numbers of groups and of images, at the paper's shares: GROUPS SAMPLES SHARE.
rows="5 250 0.8627
10 250 0.8725
20 250 0.8848
50 250 0.9187
20 150 0.8535
20 450 0.8872
20 650 0.8970"
groups_scores() {
    echo "$rows" | while read -r groups samples _; do
        score "${groups}_$samples" --key_id 0 --parent_clusters "$groups" --children_clusters "$groups" \
            --samples_per_class "$samples" --split_half
    done
}
groups_runs() {
    echo "$rows" | while read -r groups samples share; do
        for criterion in cmi random magnitude; do
            prune "mnist_groups/${groups}_${samples}_$criterion" "@${groups}_$samples" --Criterion "$criterion" \
                --Prune_per "$share" --parent_clusters "$groups" --children_clusters "$groups" --no-Refit --no-Even
        done
    done
}

legal="fc2 robustness validated short network weights weights_validated weights_long weights_rounds weights_few weights_few_validated groups"
experiments=${*:-$legal}
for name in $experiments; do
    case " $legal " in
    *" $name "*) ;;
    *)
        echo "mnist.sh: error: no experiment $name; legal: $legal" >&2
        exit 2
        ;;
    esac
done
for name in $experiments; do
    (
        case $name in # these have networks of their own, so that they can be run on another machine than the rest
        robustness) base=robustness/baseline ;;
        weights_few_validated) base=mnist_few_validated/baseline select=val held="--Val_size 10000" ;;
    validated | weights_validated) base=mnist_validated/baseline select=val ;;
        weights | weights_long | weights_rounds | weights_few | groups) base=mnist_groups/baseline ;;
        esac
        [ -n "${LIST:-}" ] || dense
        [ -n "${LIST:-}" ] || "${name}_scores"
        "${name}_runs" | if [ -n "${LIST:-}" ]; then cat; else run; fi
    )
done
