"""ResNet56 for 32 x 32 images with parameter-free shortcuts: 55 convolutions and a linear layer, 848,944 weights."""

from torch import Tensor, nn

from common.data import crop_and_flip

NAME = "resnet56"
CONVOLUTIONS = [
    "conv1.weight",
    *(f"layer{stage}.{block}.conv{k}.weight" for stage in (1, 2, 3) for block in range(9) for k in (1, 2)),
]
# (parent, child); key_id k of stage 2 is PAIRS[k]. The parent names the last convolution before the child; what is
# scored and masked is the tensor that the child reads, with batch norm, ReLU and shortcuts in it.
PAIRS = list(zip(CONVOLUTIONS, [*CONVOLUTIONS[1:], "linear.weight"], strict=True))

# What follows is the paper's, and each a default of a flag.
TRAINING = {
    "Dataset": "CIFAR10",
    "Dims": 10,
    "Epoch": 300,
    "Batch_size": 128,
    "Lr": 0.01,
    "Milestones": [150, 225],
    "Gamma": 0.1,
    "Opt": "sgd",
    "Nesterov": True,
    "Weight_decay": 2e-4,
    "Val_size": 5000,  # ours: the paper chooses the epoch on the test set (--Select test)
}
SCORING = {"samples_per_class": 500}
augment = crop_and_flip(padding=4)  # of training images; None: none
CHANNELS = {"conv1": 16, "layer1": 16, "layer2": 32, "layer3": 64, "linear": 10}
GROUPS = {  # one group per channel: numbers of parent and of child groups, by child
    child: tuple(CHANNELS[key.split(".")[0]] for key in (parent, child)) for parent, child in PAIRS
}
UNMASKED = {CONVOLUTIONS[k - 1] for k in (1, 16, 20, 38, 54)} | {"linear.weight"}
MAX_SPARSITY = {child: 0.5 for _, child in PAIRS if child not in UNMASKED}  # at most how much of each is pruned
# what --Granularity channel prunes by default: the second convolutions of blocks, which alone read what they read
INNER = [child for child in MAX_SPARSITY if child.endswith("conv2.weight")]
RETRAINING = {
    **TRAINING,
    "Lr": 0.1,
    "Milestones": [90, 180, 260],
    "Gamma": 0.2,
    "Nesterov": False,
    "Weight_decay": 5e-4,
    "lower_prune_per": 0.3,
    "upper_prune_per": 0.5,
    "prune_per_step": 0.05,
}


class Block(nn.Module):
    """Two convolutions of 3 x 3; the shortcut skips pixels and pads channels where the size changes (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.padding:
            skipped = x[:, :, :: self.stride, :: self.stride]
            shortcut = nn.functional.pad(skipped, (0, 0, 0, 0, self.padding, self.padding))
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut).relu()


class ResNet56(nn.Module):
    """He et al. (2016), section 4.2, n = 9."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inputs if block == 0 else width, width) for block in range(9)))
            for inputs, width in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


build = ResNet56
