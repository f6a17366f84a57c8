"""Stage 1: train the dense ResNet56 on CIFAR-10.

    python train_stage1.py

Reads CIFAR-10 from data/ (downloaded if absent). Writes to results/resnet56/baseline/<rerun>/: logits_best.pkl (the
best epoch by validation accuracy), logits_final.pkl (the last epoch), their records, and one line per epoch. Run again,
it goes on where it was killed; `torchrun --nproc_per_node N train_stage1.py` uses N GPUs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.train(__doc__, model)
