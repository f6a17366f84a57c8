"""Least squares refit of masked layers, against plain least squares and on its invariants."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from common import masks, refit
from common.activations import output_sensitivity
from common.data import Split
from common.errors import InputError


@pytest.fixture
def split():
    torch.manual_seed(0)
    return Split(torch.randint(0, 256, (300, 2, 6, 6), dtype=torch.uint8), torch.arange(300) % 3)


@pytest.fixture
def network(split):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )  # fmt: skip
    refit.recalibrate_batch_norm(net, split)
    return net.eval()


KEYS = ("3.weight", "7.weight", "9.weight")


def pruned(network, share=0.5, keys=KEYS):
    """A copy with a random mask applied, and the mask."""
    generator, copied = torch.Generator().manual_seed(2), copy.deepcopy(network)
    mask = masks.Mask()
    for key in keys:
        weight = network.get_parameter(key)
        kept = torch.rand(weight.shape[:2], generator=generator) >= share
        mask[key] = kept.reshape(kept.shape + (1,) * (weight.ndim - 2)).expand_as(weight).contiguous()
    mask.apply(copied)
    return copied, mask


def test_nothing_masked_changes_nothing(network, split):
    copied, mask = pruned(network, share=0.0)
    refit.refit(copied, network, mask, split)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[key], value, rtol=1e-5, atol=1e-5)


def test_masks_stay_zero_and_outputs_come_closer(network, split):
    images = split.images.float() / 255
    copied, mask = pruned(network)
    with torch.no_grad():
        wanted, before = network(images), copied(images)
        refit.refit(copied, network, mask, split)
        after = copied(images)
    for key, kept in mask.items():
        assert (copied.get_parameter(key)[~kept] == 0).all()
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


def test_a_sweep_that_does_harm_is_undone(network, split, monkeypatch):
    """And no other is made: the outputs are those of the sweep before it."""
    dense, solve, solved = copy.deepcopy(network), refit._solve, []
    copied, mask = pruned(network)
    expected = copy.deepcopy(copied)
    refit.refit(expected, dense, mask, split, sweeps=1)

    def harmful(layer, *system):
        solve(layer, *system)
        solved.append(layer)
        if len(solved) > 2 * len(mask):
            layer.weight.mul_(-1)

    monkeypatch.setattr(refit, "_solve", harmful)
    refit.refit(copied, dense, mask, split, sweeps=9)
    assert len(solved) == 3 * len(mask)
    torch.testing.assert_close(copied.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_linear_layer_is_ordinary_least_squares(network, split, monkeypatch):
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    copied, mask = pruned(network, keys=("7.weight",))
    refit.refit(copied, network, mask, split)
    with torch.no_grad():
        read = network[:7](split.images.float() / 255).double().numpy()
        wanted = network[:8](split.images.float() / 255).double().numpy()
    for unit in range(8):
        kept = mask["7.weight"][unit].numpy()
        model = LinearRegression().fit(read[:, kept], wanted[:, unit])
        assert copied[7].weight[unit].detach().numpy()[kept] == pytest.approx(model.coef_, rel=1e-3, abs=1e-4)
        assert copied[7].bias[unit].item() == pytest.approx(model.intercept_, rel=1e-3, abs=1e-3)


def test_layers_in_a_row_are_fitted_one_after_the_other(split, monkeypatch):
    """Each to what it reads in the pruned network, where the layers before it are fitted already."""
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    found, mask = pruned(dense, share=0.4, keys=("5.weight", "1.weight", "3.weight"))
    expected, images = copy.deepcopy(found), split.images.float() / 255
    refit.refit(found, dense, mask, split)
    for k in (1, 3, 5):
        with torch.no_grad():
            read, wanted = expected[:k](images).double().numpy(), dense[: k + 1](images).double().numpy()
            for unit, kept in enumerate(mask[f"{k}.weight"].numpy()):
                model = LinearRegression().fit(read[:, kept], wanted[:, unit])
                expected[k].weight[unit, kept] = torch.from_numpy(model.coef_).float()
                expected[k].bias[unit] = float(model.intercept_)
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected(images), rtol=1e-3, atol=1e-3)


def test_a_convolution_is_least_squares_on_patches(network, split, monkeypatch):
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    copied, mask = pruned(network, keys=("3.weight",))
    refit.refit(copied, network, mask, split)
    with torch.no_grad():
        read, wanted = (network[:k](split.images.float() / 255).double() for k in (3, 4))
    kept = mask["3.weight"][1, :, 0, 0]
    patches = torch.stack([read[:, kept, r : r + 3, c : c + 3] for r in (0, 2) for c in (0, 2)], 1).flatten(0, 1)
    ones = torch.ones(len(patches), 1, dtype=torch.float64)
    target = wanted[:, 1].flatten(1).flatten()
    solution = torch.linalg.lstsq(torch.cat([patches.flatten(1), ones], 1), target).solution
    torch.testing.assert_close(copied[3].weight[1, kept].flatten().double(), solution[:-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(copied[3].bias[1].double(), solution[-1], rtol=1e-3, atol=1e-3)


def test_batch_norm_takes_its_statistics_from_the_images(network, split):
    with torch.no_grad():
        maps = network[0](split.images.float() / 255)
    torch.testing.assert_close(network[1].running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network[1].running_var, maps.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert network[1].momentum == 0.1
    assert not network[1].training


def test_batch_norm_that_runs_twice_takes_the_mean_of_both():
    torch.manual_seed(0)
    norm, scale = nn.BatchNorm1d(4), nn.Linear(4, 4)
    net = nn.Sequential(nn.Flatten(), norm, scale, norm)
    split = Split(torch.randint(0, 256, (500, 1, 2, 2), dtype=torch.uint8), torch.zeros(500, dtype=torch.int64))
    refit.recalibrate_batch_norm(net, split)
    first = split.images.flatten(1).float() / 255
    with torch.no_grad():
        second = scale((first - first.mean(0)) / (first.var(0, unbiased=False) + norm.eps).sqrt())
    torch.testing.assert_close(norm.running_mean, (first.mean(0) + second.mean(0)) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, (first.var(0) + second.var(0)) / 2, rtol=1e-4, atol=1e-5)


def test_a_last_batch_of_one_image_is_left_out():
    """Batch norm of one value per channel has no variance; the statistics are those of the other images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    images = torch.randint(0, 256, (2**16 + 1, 1, 2, 2), dtype=torch.uint8)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    assert [len(batch) for batch, _ in split.batches()] == [2**16, 1]
    refit.recalibrate_batch_norm(net, split)
    with torch.no_grad():
        values = net[1](images[:-1].flatten(1).float() / 255)
    torch.testing.assert_close(net[2].running_mean, values.mean(0), rtol=1e-4, atol=1e-5)


def test_large_images_come_in_batches_that_have_a_variance():
    """One of 400 x 400 pixels is more than an evaluation takes at once; of one image altogether there is none."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=50), nn.BatchNorm2d(2))
    split = Split(torch.randint(0, 256, (6, 1, 400, 400), dtype=torch.uint8), torch.arange(6))
    refit.recalibrate_batch_norm(net, split)
    with torch.no_grad():
        maps = net[0](split.images.float() / 255)
    torch.testing.assert_close(net[1].running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="cannot be taken from 1 images; legal: 2 or more"):
        refit.recalibrate_batch_norm(net, split[torch.arange(1)])
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_without_batch_norm_there_is_nothing_to_recalibrate():
    """Scripts of a network that has it then serve one that has none, for which no images are drawn."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout())
    assert refit.recalibrate_batch_norm(net, None) is net
    assert not net.training


def test_sensitivity_is_what_reaches_the_outputs(split):
    """Of a linear network, exactly: variance of the unit times squared weights to the outputs, over their variance."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 3))
    split = split[torch.arange(300).repeat(20)]
    with torch.no_grad():
        net[2].weight[:, 2] = 0
        hidden = net[:2](split.images.float() / 255).double()
        outputs = net[2](hidden.float()).double()
        expected = (hidden.var(0) * net[2].weight.double().square().sum(0) / outputs.var(0).sum()).numpy()
    found = output_sensitivity(net, ["1.weight", "2.weight"], split)
    assert found["1.weight"] == pytest.approx(expected, rel=0.1)
    assert found["1.weight"][2] == 0
    assert found["2.weight"] == pytest.approx((outputs.var(0) / outputs.var(0).sum()).numpy(), rel=0.1)
    assert np.array_equal(found["1.weight"], output_sensitivity(net, ["1.weight"], split)["1.weight"])


def test_sensitivity_at_positions_sums_the_squares_of_slopes(split):
    """Of a linear network, exactly; an edge, whose slopes cancel over the map, counts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3))
    split = split[torch.arange(300).repeat(20)]
    with torch.no_grad():
        slopes = net[2].weight.reshape(3, 3, 16)
        slopes[:, 1] -= slopes[:, 1].mean(1, keepdim=True)
        maps = net[0](split.images.float() / 255).double().flatten(2)
        outputs = net(split.images.float() / 255).double()
        expected = maps.var((0, 2)) * slopes.double().square().sum((0, 2)) / outputs.var(0).sum()
    found = output_sensitivity(net, ["0.weight"], split, positions=True)["0.weight"]
    assert found == pytest.approx(expected.numpy(), rel=0.1)
    assert output_sensitivity(net, ["0.weight"], split)["0.weight"][1] < 1e-6 * found[1]


def test_sensitivity_of_maps_is_that_of_their_means(network, split):
    found = output_sensitivity(network, ["0.weight", "3.weight"], split)
    assert found["0.weight"].shape == (6,)
    assert (found["3.weight"] >= 0).all()
    with torch.no_grad():
        network[3].bias[0] = -100  # a channel that ReLU never lets through
    assert output_sensitivity(network, ["3.weight"], split)["3.weight"][0] == 0
