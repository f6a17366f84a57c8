"""Which layers are scored, masked and refitted: each supported kind by its literal meaning, every other refused."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import model_of
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from common import activations, masks, refit
from common.data import Split
from common.errors import InputError


@pytest.fixture(scope="module")
def split():
    images = torch.randint(0, 256, (300, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Split(images, torch.arange(300) % 3)


class Step(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def flat(layer, before=lambda x: x, after=lambda x: x.flatten(1)):
    """A network around one layer, "1", and a head."""
    torch.manual_seed(0)
    return nn.Sequential(Step(before), layer, Step(after), nn.ReLU(), nn.LazyLinear(3))


def built(network, split):
    network(split.images[:2] / 255)  # the head takes its size
    return network.eval()


KINDS = [
    (nn.Linear(128, 6), {"before": lambda x: x.flatten(1)}),
    *((nn.Conv1d(2, 6, 3, **o), {"before": lambda x: x.flatten(2)}) for o in ({}, {"padding": 1, "stride": 2})),
    *(
        (nn.Conv2d(2, 6, kernel, **options), {})
        for kernel, options in (
            (1, {}),
            (3, {"stride": 2, "bias": False}),
            ((3, 2), {"dilation": (1, 2), "padding": (2, 0)}),
            ((2, 4), {"padding": "same"}),
            (3, {"padding": "valid"}),
            *((3, {"padding": 1, "padding_mode": mode}) for mode in ("circular", "reflect", "replicate")),
            (2, {"padding": "same", "padding_mode": "circular"}),
        )
    ),
]


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch tells that it copies


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind[0]))
def network(request, split):
    network = flat(copy.deepcopy(request.param[0]), **request.param[1])
    network[1].reset_parameters()  # from the seed
    return built(network, split)


def test_a_masked_block_contributes_nothing(network, split):
    """To its child group it is as if its parents were 0; padding by values of the map is 0 then too."""
    blocks = masks.contiguous_blocks(network, "1.weight", 2, 3, last="4.weight")
    kept = np.ones((3, 2), bool)
    kept[1, 0] = False
    read, layer = network[0](split.images / 255.0), copy.deepcopy(network[1])
    without = read.clone()
    without[:, torch.from_numpy(blocks.parent_groups == 0)] = 0
    with torch.no_grad():
        before, expected = layer(read), layer(without)
        masks.Mask.of_blocks({"1.weight": kept}, {"1.weight": blocks}, network).apply(network)
        after, rows = network[1](read), torch.from_numpy(blocks.child_groups == 1)
    torch.testing.assert_close(after[:, rows], expected[:, rows])
    torch.testing.assert_close(after[:, ~rows], before[:, ~rows])


def test_a_refit_of_what_is_whole_changes_nothing(network, split):
    dense = copy.deepcopy(network)
    refit.refit(network, dense, masks.Mask({"1.weight": torch.ones_like(network[1].weight, dtype=torch.bool)}), split)
    for new, old in zip(network[1].parameters(), dense[1].parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=5e-4)


def test_a_refit_is_least_squares_on_what_every_output_reads(network, split, monkeypatch):
    """The fitted layer's error is orthogonal to all inputs that it keeps: their gradient is 0."""
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    monkeypatch.setattr(refit, "POSITIONS", 10**6)  # all
    dense = copy.deepcopy(network)
    kept = torch.rand(network[1].weight.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.6
    kept = kept.reshape(kept.shape + (1,) * (dense[1].weight.ndim - 2)).expand_as(dense[1].weight)
    mask = masks.Mask({"1.weight": kept})
    mask.apply(network)
    refit.refit(network, dense, mask, split)
    read = network[0](split.images / 255.0).double()
    (network.double()[1](read) - dense.double()[1](read)).square().mean().backward()
    assert network[1].weight.grad[kept].abs().max() < 1e-5
    assert (network[1].weight[~kept] == 0).all()


def test_activations_are_those_that_the_layer_read_and_returned(network, split):
    read = network[0](split.images / 255.0)
    with torch.no_grad():
        returned = network[1](read)
    for found, seen in zip(
        activations.collect_activations(network, ["1.weight"], split)["1.weight"], (read, returned), strict=True
    ):
        torch.testing.assert_close(found, seen.flatten(2).mean(2) if seen.ndim > 2 else seen)


def test_at_positions_a_layer_is_seen_as_a_linear_one(network, split):
    """Windows times weights are the outputs, at each position once; a few positions are some of them."""
    layer, split = network[1], split[torch.arange(40)]
    read, returned = activations.collect_activations(network, ["1.weight"], split, positions=10**6)["1.weight"]
    with torch.no_grad():
        torch.testing.assert_close(F.linear(read, layer.weight.flatten(1), layer.bias), returned, rtol=1e-4, atol=1e-5)
        maps = layer(network[0](split.images / 255.0))
    maps = maps.flatten(2).transpose(1, 2).flatten(0, 1) if maps.ndim > 2 else maps
    torch.testing.assert_close(returned.sort(0).values, maps.sort(0).values)
    some = activations.collect_activations(network, ["1.weight"], split, 7, positions=2, seed=1)["1.weight"]
    per_image = min(2, len(returned) // 40)
    assert len(some[0]) == len(some[1]) == 40 * per_image
    for image in range(40):
        rows = returned.reshape(40, -1, 6)[image]
        for row in some[1].reshape(40, per_image, 6)[image]:
            assert (rows - row).abs().amax(1).min() < 1e-5


def test_positions_depend_on_the_seed_alone(split):
    network = built(flat(nn.Conv2d(2, 6, 3)), split)
    one, same, other = (
        activations.collect_activations(network, ["1.weight"], split, size, positions=1, seed=seed)["1.weight"][1]
        for size, seed in ((None, 0), (16, 0), (None, 1))
    )
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other)


def test_taylor_blocks_literally(network, split):
    """The square of a block's sum of weight times gradient, image by image."""
    split = split[torch.arange(12)]
    blocks = masks.contiguous_blocks(network, "1.weight", 2, 3, last="4.weight")
    found = activations.block_taylor(network, {"1.weight": blocks}, split)["1.weight"]
    expected, weight = np.zeros((3, 2)), network[1].weight
    for image, label in zip(split.images / 255.0, split.labels, strict=True):
        loss = F.cross_entropy(network(image[None]), label[None])
        change = weight.detach() * torch.autograd.grad(loss, weight)[0]
        expected += blocks.sum(change) ** 2 / 12
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)


def in_place(change):
    """Two networks that compute the same; one of them changes tensors in place."""
    torch.manual_seed(0)
    layers = nn.Linear(128, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.a, self.b, self.c = copy.deepcopy(layers)
            self.inplace = inplace

        def forward(self, x):
            x = x.flatten(1)
            if self.inplace:
                x = self.a(x.sub_(0.5))
                change(x)
                read = x
                x = self.b(read)
                if not torch.is_grad_enabled():
                    read.mul_(3)  # what b read
                change(x)
                return self.c(x).mul_(2)
            x = self.a(x - 0.5)
            x = change(x.clone())
            return self.c(change(self.b(x).clone())) * 2

    return Net(False), Net(True)


@pytest.mark.parametrize("change", [F.relu_, lambda x: x.add_(1), lambda x: x.mul_(3)], ids=["relu", "add", "mul"])
def test_what_happens_in_place_afterwards_changes_nothing(change, split):
    keys, found = ["a.weight", "b.weight", "c.weight"], []
    for network in in_place(change):
        dense, mask = copy.deepcopy(network), masks.Mask()
        seen = [activations.collect_activations(network, keys, split, positions=count) for count in (None, 1)]
        slopes = activations.output_sensitivity(network, keys, split)
        for key in keys:
            generator = torch.Generator().manual_seed(len(mask))
            mask[key] = torch.rand(network.get_parameter(key).shape, generator=generator) < 0.5
        mask.apply(network)
        refit.refit(network, dense, mask, split)
        found.append((seen, slopes, dict(network.state_dict())))
    for plain, changed in zip(*found, strict=True):
        torch.testing.assert_close(changed, plain)


class Branches(nn.Module):
    """Layer b reaches no output, and layer a only through c, which is detached on request."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.detached = nn.Linear(128, 4), nn.Linear(4, 4), nn.Linear(4, 3), False

    def forward(self, x):
        x = self.a(x.flatten(1))
        self.b(x)
        x = self.c(x)
        return x.detach() if self.detached else x


def test_sensitivity_of_layers_that_are_frozen_or_reach_no_output(split):
    torch.manual_seed(0)
    network, keys = Branches(), ["a.weight", "b.weight", "c.weight"]
    free = activations.output_sensitivity(network, keys, split)
    assert (free["a.weight"] > 0).all()
    assert (free["b.weight"] == 0).all()
    frozen = activations.output_sensitivity(network.requires_grad_(False), keys, split)
    for key in keys:
        np.testing.assert_array_equal(frozen[key], free[key])
    network.detached = True
    with pytest.raises(InputError, match="the network's outputs have no slopes in its layers"):
        activations.output_sensitivity(network, keys, split)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_slopes_are_taken_also_where_the_caller_takes_none(off, split):
    network = built(flat(nn.Conv2d(2, 6, 3)), split)
    blocks = {"1.weight": masks.contiguous_blocks(network, "1.weight", 2, 2)}
    slopes = activations.output_sensitivity(network, ["1.weight"], split)
    changes = activations.block_taylor(network, blocks, split)
    with off():
        again = activations.output_sensitivity(network, ["1.weight"], split)
        np.testing.assert_array_equal(again["1.weight"], slopes["1.weight"])
        np.testing.assert_array_equal(activations.block_taylor(network, blocks, split)["1.weight"], changes["1.weight"])
        assert not torch.is_grad_enabled()


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never, self.twice, self.gate = (nn.Linear(128, 128) for _ in range(4))
        self.head = nn.Linear(128, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.used(x.flatten(1))))
        return self.head(x * self.gate(input=x))


def tied():
    network = nn.Sequential(nn.Flatten(), nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 3))
    network[2].weight = network[1].weight
    return network


def pruned_by_torch(network):
    prune.identity(network[1], "weight")
    return network


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x[:, 0], x[:, 0], x[:, 0])[0].mean(1))


def vectors(layer, before=lambda x: x.flatten(1), after=lambda x: x.flatten(1)):
    return flat(layer, before, after)


STATIC = {
    "grouped": (lambda: flat(nn.Conv2d(2, 4, 3, groups=2)), "1.weight is of a convolution in 2 groups"),
    "transposed": (lambda: flat(nn.ConvTranspose2d(2, 4, 3)), "1.weight is of a ConvTranspose2d"),
    "three axes": (lambda: flat(nn.Conv3d(2, 4, 1), lambda x: x[:, :, None]), "1.weight is of a Conv3d"),
    "batch norm": (lambda: flat(nn.BatchNorm2d(2)), "1.weight is of a BatchNorm2d"),
    "weight norm": (lambda: vectors(nn.utils.parametrizations.weight_norm(nn.Linear(128, 4))), "of a Parametrized"),
    "spectral norm": (lambda: vectors(nn.utils.spectral_norm(nn.Linear(128, 4))), "1.weight is computed from"),
    "torch's pruning": (lambda: pruned_by_torch(vectors(nn.Linear(128, 4))), "1.weight is computed from"),
    "no such layer": (lambda: nn.Sequential(nn.Flatten()), "1.weight: the network has no such layer"),
    "no weight": (lambda: flat(nn.ReLU()), "1.weight is of a ReLU"),
    "tied": (tied, "1.weight is 2.weight too"),
}


def every_use(network, key, split):
    """What is done to a layer, by a function each."""
    mask = {key: torch.ones(4, 4, dtype=torch.bool)}
    return (
        lambda: activations.collect_activations(network, [key], split),
        lambda: activations.output_sensitivity(network, [key], split),
        lambda: refit.refit(network, network, masks.Mask(mask), split),
    )


@pytest.mark.parametrize("kind", STATIC)
def test_other_kinds_of_layers_are_refused(kind, split):
    build, reason = STATIC[kind]
    network = build()
    network(split.images[:2] / 255)
    with pytest.raises(InputError, match=reason):
        masks.contiguous_blocks(network, "1.weight", 1, 1)
    for use in every_use(network, "1.weight", split):
        with pytest.raises(InputError, match=reason) as error:
            use()
        assert "\n" not in str(error.value)


def test_lazy_layers_are_refused_until_they_have_a_size(split):
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"1\.weight is of a LazyLinear"):
        masks.contiguous_blocks(network, "1.weight", 1, 1)
    network[1](torch.zeros(1, 128))
    with pytest.raises(InputError, match=r"2\.weight has no size yet"):
        masks.contiguous_blocks(network, "1.weight", 1, 1)
    network(split.images / 255)
    assert masks.contiguous_blocks(network, "1.weight", 2, 2).weights.shape == (2, 2)


USES = {
    "tokens": (lambda: vectors(nn.Linear(8, 4), lambda x: x[:, 0]), "1.weight", r"a tensor \(2, 8, 8\) of 2 images"),
    "rows": (
        lambda: vectors(nn.Linear(8, 4), lambda x: x.reshape(-1, 8), lambda x: x.reshape(-1, 64)),
        "1.weight",
        "of 2",
    ),
    "no batch": (lambda: flat(nn.Conv1d(2, 4, 1), lambda x: x[0, :, 0], lambda x: x.mean(1)[None]), "1.weight", "of 2"),
    "attention": (Attention, "attention.out_proj.weight", "is of a NonDynamicallyQuantizableLinear"),
    "never": (Reused, "never.weight", "runs 0 times"),
    "twice": (Reused, "twice.weight", "runs 2 times"),
    "keyword": (Reused, "gate.weight", "reads other arguments than one tensor"),
    "two outputs": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 4), Step(lambda x: (x, x))),
        "1.weight",
        "tuple",
    ),
}


@pytest.mark.parametrize("use", USES)
def test_layers_that_are_used_otherwise_are_refused(use, split):
    build, key, reason = USES[use]
    network = build()
    network(split.images[:2] / 255)
    before = copy.deepcopy(network.state_dict())
    for function in every_use(network, key, split):
        with pytest.raises(InputError, match=reason) as error:
            function()
        assert "\n" not in str(error.value)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


class HeadFirst(nn.Module):
    """The head is registered first, as the networks of some repositories are."""

    def __init__(self):
        super().__init__()
        self.head, self.a, self.b = nn.Linear(20, 10), nn.Linear(128, 30), nn.Linear(30, 20)

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu()).log_softmax(1)


def test_the_last_layer_is_the_one_that_gives_the_outputs(split):
    network = HeadFirst()
    last = activations.output_layer(network, split)
    assert last == "head.weight"
    assert masks.contiguous_blocks(network, "head.weight", 5, 5, last).weights.shape == (10, 5)
    assert masks.contiguous_blocks(network, "b.weight", 10, 8, last).weights.shape == (8, 10)
    for key in ("head.weight", "b.weight"):  # where none is named, none is guessed from the order of registration
        assert masks.contiguous_blocks(network, key, 5, 5).weights.shape == (5, 5)
    assert activations.output_layer(flat(nn.Conv2d(2, 9, 3), after=lambda x: x.mean((2, 3))), split) == "4.weight"
    maps = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert activations.output_layer(maps, split) == "1.weight"
    assert activations.output_layer(nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.Softmax(1)), split) == "1.weight"
    assert activations.output_layer(nn.Sequential(nn.Linear(8, 8), nn.Flatten()), split) is None


class Words(nn.Module):
    """A linear layer on words: images first, words first, or all words of all images as rows."""

    def __init__(self, order):
        super().__init__()
        self.order, self.words, self.head = order, nn.Linear(2, 3), nn.Linear(192, 3)

    def forward(self, x):
        return self.head(self.words(self.order(x.flatten(2).mT)).flatten().reshape(len(x), -1))


@pytest.mark.parametrize("order", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.flatten(0, 1)])
def test_weights_are_used_as_often_as_torch_counts_multiplications(order, split):
    network = Words(order)
    assert activations.output_positions(network, split) == {"words.weight": 64, "head.weight": 1}
    with FlopCounterMode(display=False) as flops:
        network(split.images[:1] / 255)
    assert flops.get_total_flops() // 2 == 64 * 6 + 3 * 192


def test_a_refit_follows_the_network_not_the_names(split):
    dense, keys, found = HeadFirst(), ["a.weight", "b.weight", "head.weight"], []
    random = {key: torch.rand_like(dense.get_parameter(key)) < 0.5 for key in keys}
    for order in itertools.permutations(keys):
        network, mask = copy.deepcopy(dense), masks.Mask({key: random[key] for key in order})
        mask.apply(network)
        refit.refit(network, dense, mask, split)
        found.append(network.state_dict())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "resnet56"])
def test_layers_of_the_networks_run_in_the_order_of_their_pairs(name):
    model = model_of(name)
    network, children = model.build(10), [child for _, child in model.PAIRS]
    side, channels = (28, 1) if name == "mlp" else (32, 3)
    images = Split(torch.zeros(4, channels, side, side, dtype=torch.uint8), torch.arange(4))
    first = ["fc1.weight"] if name == "mlp" else []
    expected = first + [child for child in children if child not in first]
    assert activations.run_order(network, children[::-1], images) == expected
    assert activations.output_layer(network, images) == expected[-1]
