"""Stage 3: prune the MNIST-MLP by the scores of stage 2 and retrain what is left.

    python retrain_stage3.py --Prune_per 0.962

Reads a checkpoint of stage 1 and, unless --Criterion says otherwise, scores of stage 2. Writes to
results/mlp/pruned/<rerun>/: logits_<pruned>.pkl, where <pruned> is the percentage of the masked layers' weights
that are exactly zero, its record, and one line per epoch.
Expect about 98.4 % on the test set with 96.2 % of fc2 pruned; about a minute on two CPU cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.retrain(__doc__, model)
