#!/bin/sh
# The paper's adversarial study (robustness.py): dense and pruned networks under iterative FGSM and the iterative
# least-likely class. The MLP over the whole test set, networks by mnist.sh; ResNet56 refitted at 70 %, by rules.sh, over
# IMAGES test images, as a core makes some 130 gradients a second. Finished runs are skipped.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python}
export DATA_DIR="${DATA_DIR:-$(dirname "$PWD")/data}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
networks=${NETWORKS:-3}
rules=${RULES:-positions magnitude}

NETWORKS=$networks SHARES=0.962 ./mnist.sh robustness
NETWORKS="$(seq -s ' ' 0 $((networks - 1)))" SAMPLINGS=0 SHARES=0.7 RULES=$rules ./rules.sh resnet56
for number in $(seq 0 $((networks - 1))); do
    $python robustness.py mlp --Data_dir "$DATA_DIR" --eps 0.001 0.003 0.005 0.007 0.009 -- \
        "robustness/baseline/$number/logits_best.pkl" \
        $(for rule in correlated magnitude random; do echo "robustness/${rule}_even/$number/0/logits_96.20.pkl"; done)
    $python robustness.py resnet56 --Data_dir "$DATA_DIR" --images "${IMAGES:-100}" --eps 0.001 0.003 0.005 -- \
        "cifar10_jpeg/resnet56/baseline/$number/0/logits_best.pkl" \
        $(for rule in $rules; do echo "cifar10_before/$rule/${number}_0/0/logits_70.00.pkl"; done)
done
