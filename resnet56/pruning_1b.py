"""Stage 2: score pairs of layers of ResNet56.

    python pruning_1b.py --key_id all

key_id k is PAIRS[k] of model.py, from 0, (conv1, layer1.0.conv1), to 54, (layer3.8.conv2, linear); "all" scores every
pair after one pass over the images. A child's parents are the channels that it reads, after shortcuts and ReLU. Reads
logits_best.pkl from --weights_dir and images of the training split. Writes beside the checkpoint:
I_parent_<postfix>_<parent>_<child>.npy, the conditional mutual information of every group of the child layer with every
group of the parent layer given all other parents; the groups' labels; a record. A run that was killed goes on where it
was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.score(__doc__, model)
