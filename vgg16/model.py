"""VGG16 with batch norm for 32 x 32 images: 13 convolutions and 2 linear layers, 14,977,728 weights."""

from itertools import pairwise

from torch import Tensor, nn

from common.data import crop_and_flip

NAME = "vgg16"
WIDTHS = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"]
LAYERS = [*(f"conv{k}.weight" for k in range(1, 14)), "linear1.weight", "linear2.weight"]
PAIRS = list(pairwise(LAYERS))  # (parent, child); key_id k of stage 2 is PAIRS[k]

# What follows is the paper's, and each a default of a flag.
TRAINING = {
    "Dataset": "CIFAR10",
    "Dims": 10,
    "Epoch": 300,
    "Batch_size": 128,
    "Lr": 0.1,
    "Milestones": [90, 180, 260],
    "Gamma": 0.2,
    "Opt": "sgd",
    "Nesterov": True,
    "Weight_decay": 5e-4,
    "Val_size": 5000,  # ours: the paper chooses the epoch on the test set (--Select test)
}
SCORING = {"samples_per_class": 650}
GROUPS = {child: (64, 64) for _, child in PAIRS}  # numbers of parent and of child groups, by child
augment = crop_and_flip(padding=4)  # of training images; None: none
MAX_SPARSITY = {  # layers that are pruned, and at most how much of each
    **{f"conv{k}.weight": 0.45 for k in range(5, 9)},
    **{f"conv{k}.weight": 0.8 for k in range(9, 14)},
    "linear1.weight": 0.8,
}
RETRAINING = {**TRAINING, "lower_prune_per": 0.5, "upper_prune_per": 0.7, "prune_per_step": 0.05}


class VGG16(nn.Module):
    """Convolutions of 3 x 3 and pooling by `WIDTHS`, two linear layers; batch norm and ReLU after all but the last."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        channels, convolutions = 3, 0
        for width in WIDTHS:
            if width == "pool":
                continue
            convolutions += 1
            self.add_module(f"conv{convolutions}", nn.Conv2d(channels, width, 3, padding=1))
            self.add_module(f"bn{convolutions}", nn.BatchNorm2d(width))
            channels = width
        self.linear1 = nn.Linear(channels, 512)
        self.bn14 = nn.BatchNorm1d(512)
        self.linear2 = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        x, convolutions = images, 0
        for width in WIDTHS:
            if width == "pool":
                x = nn.functional.max_pool2d(x, 2)
                continue
            convolutions += 1
            x = self.get_submodule(f"bn{convolutions}")(self.get_submodule(f"conv{convolutions}")(x)).relu()
        return self.linear2(self.bn14(self.linear1(x.flatten(1))).relu())


build = VGG16
