"""The convolutional networks: sizes, layer pairs, and that every layer's parent is the tensor it reads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONVOLUTIONAL, model_of

from common import masks
from common.errors import InputError
from common.training import set_dropout

WEIGHTS = {"vgg16": 14_977_728, "resnet56": 848_944, "resnet50": 25_502_912}
MASKED = {"vgg16": 14_712_832, "resnet56": 785_664, "resnet50": 23_445_504}
SIDE = {"vgg16": 32, "resnet56": 32, "resnet50": 64}


@pytest.fixture(scope="module", params=CONVOLUTIONAL)
def built(request):
    """(name, model module, network with running statistics that are not trivial)"""
    torch.manual_seed(0)
    model = model_of(request.param)
    network = model.build(model.TRAINING["Dims"])
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return request.param, model, network.eval()


def seen_by_layers(network, keys, images):
    """(input, output) of layers by key, whole feature maps."""
    found = {}
    for key in keys:
        network.get_submodule(key.removesuffix(".weight")).register_forward_hook(
            lambda _m, inputs, output, key=key: found.update({key: (inputs[0], output)})
        )
    with torch.no_grad():
        network(images)
    return found


def test_numbers_of_weights(built):
    name, model, network = built
    assert sum(p.numel() for p in network.parameters() if p.ndim > 1) == WEIGHTS[name]
    assert sum(network.get_parameter(key).numel() for key in model.MAX_SPARSITY) == MASKED[name]


def test_every_layer_but_the_first_is_a_child_once(built):
    _, model, network = built
    layers = [f"{n}.weight" for n, m in network.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert [child for _, child in model.PAIRS] == layers[1:]
    assert set(model.GROUPS) == set(layers[1:])
    assert {parent for parent, _ in model.PAIRS} <= set(layers)
    for parent, child in model.PAIRS:  # the named parent has as many outputs as the child has inputs
        assert network.get_parameter(parent).shape[0] == network.get_parameter(child).shape[1]


def last_layer(network):
    """That of these four networks which gives the outputs."""
    return [key for key, parameter in network.named_parameters() if parameter.ndim > 1][-1]


def test_a_mask_block_is_the_contribution_of_an_input_group(built, rng):
    """Masking block (child group, parent group) is the same as zeroing these inputs, for this child group alone."""
    name, model, network = built
    found = seen_by_layers(network, list(model.GROUPS), torch.rand(2, 3, SIDE[name], SIDE[name]))
    for child, groups in model.GROUPS.items():
        layer, (read, returned) = network.get_submodule(child.removesuffix(".weight")), found[child]
        blocks = masks.contiguous_blocks(network, child, *groups, last_layer(network))
        j, i = (rng.integers(max(labels) + 1) for labels in (blocks.child_groups, blocks.parent_groups))
        kept_blocks = np.ones(blocks.weights.shape, bool)
        kept_blocks[j, i] = False
        kept = masks.Mask.of_blocks({child: kept_blocks}, {child: blocks}, network)[child]
        without = read.clone()
        without[:, torch.from_numpy(blocks.parent_groups == i)] = 0
        rows = torch.from_numpy(blocks.child_groups == j)
        operation = (
            (lambda x, w, m=layer: F.conv2d(x, w, m.bias, m.stride, m.padding))
            if isinstance(layer, torch.nn.Conv2d)
            else (lambda x, w, m=layer: F.linear(x, w, m.bias))
        )
        with torch.no_grad():
            masked = operation(read, layer.weight * kept)
            torch.testing.assert_close(masked[:, rows], layer(without)[:, rows], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(masked[:, ~rows], returned[:, ~rows], rtol=1e-4, atol=1e-4)


def literal_inputs(name, network, images, v1=False):
    """What every layer reads, by the published definitions written out with plain functions."""
    state, reads = network.state_dict(), {}

    def conv(x, key, stride=1, padding=1):
        reads[f"{key}.weight"] = x
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), stride, padding)

    def norm(x, key):
        return F.batch_norm(x, *(state[f"{key}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    def vgg16(x):
        for k in range(1, 14):
            x = norm(conv(x, f"conv{k}"), f"bn{k}").relu()
            if k in (2, 4, 7, 10, 13):
                x = F.max_pool2d(x, 2)
        reads["linear1.weight"] = x.flatten(1)
        x = norm(F.linear(x.flatten(1), state["linear1.weight"], state["linear1.bias"]), "bn14").relu()
        reads["linear2.weight"] = x

    def resnet56(x):
        x = norm(conv(x, "conv1"), "bn1").relu()
        for stage in (1, 2, 3):
            for block in range(9):
                stride = 2 if stage > 1 and block == 0 else 1
                key, shortcut = f"layer{stage}.{block}", x
                if stride == 2:
                    quarter = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                    shortcut = torch.cat([quarter, x[:, :, ::2, ::2], quarter], 1)
                y = norm(conv(x, f"{key}.conv1", stride), f"{key}.bn1").relu()
                x = (norm(conv(y, f"{key}.conv2"), f"{key}.bn2") + shortcut).relu()
        reads["linear.weight"] = x.mean((2, 3))

    def resnet50(x):
        x = F.max_pool2d(norm(conv(x, "conv1", 2, 3), "bn1").relu(), 3, 2, 1)
        for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                key, shortcut = f"layer{stage}.{block}", x
                y = norm(conv(x, f"{key}.conv1", stride if v1 else 1, 0), f"{key}.bn1").relu()
                y = norm(conv(y, f"{key}.conv2", 1 if v1 else stride), f"{key}.bn2").relu()
                y = norm(conv(y, f"{key}.conv3", 1, 0), f"{key}.bn3")
                if block == 0:
                    shortcut = norm(conv(x, f"{key}.downsample.0", stride, 0), f"{key}.downsample.1")
                x = (y + shortcut).relu()
        reads["fc.weight"] = x.mean((2, 3))

    with torch.no_grad():
        {"vgg16": vgg16, "resnet56": resnet56, "resnet50": resnet50}[name](images)
    return reads


def test_parents_are_what_the_children_read(built):
    """After batch norm, ReLU, shortcut sums and pooling; downsample convolutions included."""
    name, model, network = built
    images = torch.rand(2, 3, SIDE[name], SIDE[name])
    found, expected = seen_by_layers(network, list(model.GROUPS), images), literal_inputs(name, network, images)
    assert set(found) <= set(expected)
    for key, (read, _) in found.items():
        torch.testing.assert_close(read, expected[key], rtol=1e-3, atol=1e-3)


def test_resnet50_v1_takes_the_same_weights_with_strides_in_1x1_convolutions(monkeypatch):
    """The layers read what the published definition of v1 says, which differs from v1.5's."""
    model = model_of("resnet50")
    weights, images = model.build(2).state_dict(), torch.rand(2, 3, SIDE["resnet50"], SIDE["resnet50"])
    monkeypatch.setattr(model, "STRIDE_IN_1X1", True)
    network = model.build(2).eval()
    network.load_state_dict(weights)
    found = seen_by_layers(network, list(model.GROUPS), images)
    expected, other = (literal_inputs("resnet50", network, images, v1=v1) for v1 in (True, False))
    for key, (read, _) in found.items():
        torch.testing.assert_close(read, expected[key], rtol=1e-3, atol=1e-3)
    assert found["layer2.0.conv2.weight"][0].shape != other["layer2.0.conv2.weight"].shape


def test_the_largest_default_share_is_within_the_limits(built, rng):
    _, model, network = built
    last = last_layer(network)
    sizes = [masks.contiguous_blocks(network, k, *model.GROUPS[k], last).weights for k in model.MAX_SPARSITY]
    share = model.RETRAINING["upper_prune_per"]
    kept = masks.select([rng.random(size.shape) for size in sizes], sizes, share, list(model.MAX_SPARSITY.values()))
    total = sum(size.sum() for size in sizes)
    assert sum(size[~k].sum() for size, k in zip(sizes, kept, strict=True)) / total == pytest.approx(share, abs=1e-3)


def test_dropout_where_there_is_none_is_refused():
    with pytest.raises(InputError, match=r"`dropout` 0\.1: this network has no dropout layers"):
        set_dropout(model_of("resnet56").build(10), 0.1)
