#!/bin/sh
# What wants a GPU, in an hour or a few: VGG16 trained on CIFAR-10, then it and ResNet56 pruned by every rule (rules.sh,
# channels.sh), not retrained and retrained for each of EPOCHS, three dense networks each, what is worth most first, both
# side by side with JOBS runs at a time; training speed. What fails stops nothing else and is named at the end. Finished
# runs are skipped, killed ones go on: LIMIT=seconds ends it then. OUT=folder gets records, scores and logs at once.
# In half an hour, three times: LIMIT=570 OUT=records experiments/gpu.sh
# A rehearsal: DENSE_EPOCHS=1 EPOCHS=0 NETWORKS=0 STEPS=2 SHARES=0.5 experiments/gpu.sh
# The paper's 300 epochs, days on one GPU: experiments/cifar10.sh
set -u
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" DATA_DIR="${DATA_DIR:-$PWD/data}" TRAIN_FLAGS="${TRAIN_FLAGS:-}" SCORE_FLAGS="${SCORE_FLAGS:-}"
logs=results/gpu end=$(($(date +%s) + ${LIMIT:-9999999})) pids='' lanes='' failed=''
mkdir -p "$logs" ${OUT:+"$OUT"}
touch "$logs/began"

limited() { # COMMAND...: until the time is up; takes the place of the shell that calls it
    left=$((end - $(date +%s)))
    exec timeout $((left > 0 ? left : 1)) "$@"
}
copy() { # what is new since this command began
    find results -type f -newer "$logs/began" \( -name '*.json' -o -name '*.npy' -o -name '*.log' \) > "$logs/new"
    [ -z "${OUT:-}" ] || tar -cf - -T "$logs/new" 2> /dev/null | tar -xf - -C "$OUT"
}
note() { # NAME: what has just failed, unless for want of time
    code=$?
    [ $code = 124 ] || failed="$failed
$1, exit code $code: $(tail -n 1 "$logs/$1.log")"
}
at_once() { # runs its input's lines, JOBS at a time
    tr '\n' '\0' | limited xargs -0 -P "${JOBS:-4}" -n 1 sh -c 'eval "$1" || { echo "FAILED: $1"; exit 1; }' sh
}
runs() { # NETWORK EPOCHS RULES: lines for `at_once`
    for rule in $3; do
        for number in ${NETWORKS:-0 1 2}; do
            [ "$rule" = channels ] && echo "env EPOCHS=$2 NETWORKS=$number experiments/channels.sh $1" ||
                echo "env EPOCHS=$2 RULES=$rule NETWORKS=$number experiments/rules.sh $1"
        done
    done
}
lane() { # NETWORK: its dense networks, then their scores, then all runs
    [ "$1" = resnet56 ] || for number in ${NETWORKS:-0 1 2}; do
        echo "cd $1 && $PYTHON train_stage1.py --Data_dir \"$DATA_DIR\" --Epoch ${DENSE_EPOCHS:-40} --Schedule one-cycle --Lr 0.1" \
            "--Label_smoothing 0.1 --Select last $TRAIN_FLAGS --Seed $number --Save_dir cifar10_jpeg/$1/baseline/$number"
    done | (at_once) || return
    for rule in positions means paper; do
        case " ${RULES:-$rule} " in *" $rule "*) runs "$1" 0 "$rule" | sed 's/^env/env SHARES=none/' ;; esac
    done | (at_once) || return
    for epochs in ${EPOCHS:-3 0 30 10}; do
        case $epochs in
        0) runs "$1" 0 "${RULES:-positions magnitude channels taylor random means paper}" ;;
        3) runs "$1" 3 "${RULES:-positions magnitude dense random paper channels}" ;;
        *) runs "$1" "$epochs" "${RULES:-positions magnitude dense random paper}" ;;
        esac
    done | (at_once)
}
trap 'kill $pids 2> /dev/null; copy' EXIT
trap 'exit 130' INT TERM

for way in "" --no-Compile; do # with CUDA graphs; where that fails, without. Images are unpacked here, once for all
    [ -f "$logs/way" ] && break
    (cd resnet56 && limited "$PYTHON" train_stage1.py $TRAIN_FLAGS $way --Data_dir "$DATA_DIR" --Select last --Epoch 1 \
        --Milestones 1 --Classes cat ship --Save_dir "gpu/look$way") > "$logs/look$way.log" 2>&1 &&
        echo "$way" > "$logs/way" || note "look$way"
    rm -rf "$logs/look$way" # no experiment
done
TRAIN_FLAGS="$TRAIN_FLAGS $(cat "$logs/way")" || { echo "Nothing runs:$failed"; exit 1; }

for network in resnet56 vgg16; do
    lane $network > "$logs/$network.log" 2>&1 &
    pids="$pids $!" lanes="$lanes $network=$!"
done
while sleep 10; do copy; done &
pids="$pids $!"
for lane in $lanes; do
    wait "${lane#*=}" || note "${lane%=*}"
done
if [ ! -f "$logs/speed" ]; then
    (limited "$PYTHON" benchmarks/epochs.py --Data_dir "$DATA_DIR" --steps "${STEPS:-100}") > "$logs/epochs.log" 2>&1 &&
        touch "$logs/speed" || note epochs
fi
[ "$(date +%s)" -lt "$end" ] || echo "The time is up: the same command goes on."
! grep -h ^FAILED "$logs"/*.log && [ -z "$failed" ] || { echo "Failed:$failed"; exit 1; }
