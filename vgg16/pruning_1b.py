"""Stage 2: score pairs of layers of VGG16.

    python pruning_1b.py --key_id all

key_id k is PAIRS[k] of model.py, from 0, (conv1, conv2), to 13, (linear1, linear2); "all" scores every pair after one
pass over the images. Stage 3 prunes by 3 (conv5) to 12 (linear1). Reads logits_best.pkl from --weights_dir and images
of the training split. Writes beside the checkpoint: I_parent_<postfix>_<parent>_<child>.npy, the conditional mutual
information of every group of the child layer with every group of the parent layer given all other parents; the groups'
labels; a record. A run that was killed goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.score(__doc__, model)
