"""Stage 3: prune ResNet56 by the scores of stage 2 and retrain what is left.

    python retrain_stage3.py --key_id 0

Prunes the layers in LIMITS of model.py: all convolutions but the 1st, 16th, 20th, 38th and 54th. Reads a checkpoint of
stage 1 and, unless --Criterion says otherwise, scores of stage 2. Writes to results/resnet56/pruned/<rerun>/:
logits_<pruned>.pkl, where <pruned> is the percentage of the masked layers' weights that are exactly zero, its record,
and one line per epoch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.retrain(__doc__, model)
