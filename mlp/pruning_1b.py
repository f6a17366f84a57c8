"""Stage 2: score one pair of layers of the MNIST-MLP.

    python pruning_1b.py --key_id 0

key_id 0 is (fc1, fc2), 1 is (fc2, final), 2 is (pixels, fc1), "all" every one. Reads logits_best.pkl from --weights_dir
and images of the training split. Writes beside the checkpoint: I_parent_<postfix>_<parent>_<child>.npy, the conditional
mutual information of every group of the child layer with every group of the parent layer given all other parents; the
groups' labels; a record. A run that was killed goes on where it was. Expect about half a minute on two CPU cores for
key_id 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from common import stages

if __name__ == "__main__":
    stages.score(__doc__, model)
