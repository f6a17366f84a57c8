"""ResNet50, torchvision's: 53 convolutions, 4 of them on shortcuts, and a linear layer; 25,502,912 weights."""

from torch import nn

from common.data import torchvision

NAME = "resnet50"
# True: v1, as weights of Keras and Caffe want it; no file tells: with the wrong value it loads, and is less accurate.
STRIDE_IN_1X1 = False
# What stage 1's --Weights torchvision loads; 76.13 % top-1
PRETRAINED = None if STRIDE_IN_1X1 else "ResNet50_Weights.IMAGENET1K_V1"


def _pairs() -> list[tuple[str, str]]:
    """(parent, child) in the order of the state_dict.

    The parent names the last convolution before the child; what is scored and masked is the tensor that the child
    reads, with batch norm, ReLU, pooling and shortcuts in it. A block's first convolution and the one on its shortcut
    read the same tensor.
    """
    pairs, parent = [], "conv1.weight"
    for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            conv1, conv2, conv3 = (f"layer{stage}.{block}.conv{k}.weight" for k in (1, 2, 3))
            pairs += [(parent, conv1), (conv1, conv2), (conv2, conv3)]
            if block == 0:
                pairs.append((parent, f"layer{stage}.0.downsample.0.weight"))
            parent = conv3
    return [*pairs, (parent, "fc.weight")]


PAIRS = _pairs()  # key_id k of stage 2 is PAIRS[k]

# What follows is the paper's, and each a default of a flag.
TRAINING = {
    "Dataset": "ImageNet",
    "Dims": 1000,
    "Epoch": 100,
    "Batch_size": 64,
    "Lr": 0.1,
    "Milestones": [30, 60, 90],
    "Gamma": 0.1,
    "Opt": "sgd",
    "Nesterov": False,
    "Weight_decay": 1e-4,
    "Val_size": 10000,  # ours: the paper chooses the epoch on the images that it reports (--Select test)
}
SCORING = {"samples_per_class": 5}
GROUPS = {child: (64, 64) for _, child in PAIRS}  # numbers of parent and of child groups, by child
# all convolutions but the first; at most how much of each is pruned
MAX_SPARSITY = {child: 0.55 for _, child in PAIRS[:-1]}
# what --Granularity channel prunes by default: the convolutions that alone read what they read
INNER = [child for child in MAX_SPARSITY if child.endswith(("conv2.weight", "conv3.weight"))]
RETRAINING = {
    **TRAINING,
    # the paper goes on for 30 epochs at 1e-5, here as the last steps of one schedule: .1, .01, .001, .0001, .00001
    "Epoch": 130,
    "Milestones": [30, 60, 90, 100],
    "lower_prune_per": 0.45,
    "upper_prune_per": 0.53,
    "prune_per_step": 0.02,
}


def augment() -> list:
    """What is done to training images, each for itself: transforms of torchvision."""
    transforms = torchvision().transforms.v2
    return [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]


def build(classes: int = 1000) -> nn.Module:
    """The network with random weights.

    The first block of stages 2 to 4 halves its map in the 3 x 3 convolution (v1.5, torchvision) or in the 1 x 1
    convolution before it (v1; He et al., CVPR 2016). Names and shapes are the same.
    """
    network = torchvision().models.resnet50(num_classes=classes)
    for block in (network.layer2[0], network.layer3[0], network.layer4[0]) if STRIDE_IN_1X1 else ():
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return network
