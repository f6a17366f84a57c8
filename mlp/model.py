"""The MNIST-MLP: 784-500-300-10 with ReLU and dropout; 545,810 parameters, of them 150,000 weights in fc2."""

from torch import Tensor, nn

NAME = "mlp"
PAIRS = [  # (parent, child); key_id k of stage 2 is PAIRS[k]
    ("fc1.weight", "fc2.weight"),
    ("fc2.weight", "final.weight"),
    ("input", "fc1.weight"),  # the pixels; not in the paper
]

# What follows is the paper's, and each a default of a flag; images are in [0, 1].
TRAINING = {
    "Dataset": "MNIST",
    "Dims": 10,
    "Epoch": 30,
    "Batch_size": 256,
    "Lr": 0.1,
    "Milestones": [10, 20],
    "Gamma": 0.1,
    "Opt": "sgd",
    "Nesterov": True,
    "Weight_decay": 1e-4,
    "Val_size": 3000,  # ours: the paper chooses the epoch on the test set (--Select test)
}
SCORING = {"samples_per_class": 650}
GROUPS = {  # numbers of parent and of child groups, by child; the last layer's children are the classes
    "fc1.weight": (784, 100),
    "fc2.weight": (250, 100),
    "final.weight": (100, 10),
}
MAX_SPARSITY = {"fc2.weight": 0.99}  # the layer that is pruned, and at most how much of it
RETRAINING = {**TRAINING, "lower_prune_per": 0.902, "upper_prune_per": 0.982, "prune_per_step": 0.01}
RETRAINING |= {"Even": True, "Refit": True}  # ours, see results/README.md; the paper's rule: --no-Even --no-Refit


class MLP(nn.Module):
    """Three linear layers; the input is any image tensor with 784 values per image, in [0, 1]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 500)
        self.fc2 = nn.Linear(500, 300)
        self.final = nn.Linear(300, classes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.dropout(self.fc1(images.flatten(1)).relu())
        hidden = self.dropout(self.fc2(hidden).relu())
        return self.final(hidden)


build = MLP
