#!/bin/sh
# What wants a GPU, what matters most first: a look whether training runs, Experiment 1 on CIFAR-10 for both networks
# side by side, training speed. Takes the settings of cifar10.sh from the environment (EPOCHS, SEEDS, SHARES, DATA_DIR,
# JOBS of each network, ...). What fails stops nothing else and is named at the end. Finished runs are skipped, killed
# ones go on. LIMIT=seconds ends it then, the same command goes on; OUT=folder gets records, scores and logs at once.
# In half an hour, three times: LIMIT=570 OUT=records EPOCHS=100 RETRAIN_EPOCHS=30 experiments/gpu.sh
# A rehearsal: EPOCHS=1 STEPS=2 SHARES=0.5 FOLDER=rehearsal SCORE_FLAGS="--estimator gaussian" experiments/gpu.sh
set -u
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" DATA_DIR="${DATA_DIR:-$PWD/data}" JOBS="${JOBS:-3}" TRAIN_FLAGS="${TRAIN_FLAGS:-}"
export SCORE_FLAGS="${SCORE_FLAGS---device cuda}"
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
    limited env FOLDER="${FOLDER:+$FOLDER/$network}" experiments/cifar10.sh $network > "$logs/$network.log" 2>&1 &
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
