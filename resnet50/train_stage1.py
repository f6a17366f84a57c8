"""Stage 1: take torchvision's ResNet50, or train it on ImageNet.

    python train_stage1.py --Weights torchvision

With --Weights torchvision (or a file) nothing is trained: the weights are evaluated and written. Reads the standard
folders train/<wnid>/ and val/<wnid>/ in --Data_dir; val is the test set. Writes to results/resnet50/baseline/<rerun>/:
logits_best.pkl, its record and, after training, logits_final.pkl and one line per epoch. Run again, it goes on where it
was killed; `torchrun --nproc_per_node N train_stage1.py` uses N GPUs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.train(__doc__, model)
