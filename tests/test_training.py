"""Training, evaluation and activations on a small problem."""

import math

import pytest
import torch
from torch import nn

from common.activations import paired
from common.data import Split
from common.errors import Diverged
from common.training import Recipe, evaluate, fit

RECIPE = Recipe(epochs=4, batch_size=20, lr=0.1, milestones=(2, 3), gamma=0.1, weight_decay=1e-4)


@pytest.fixture
def split():
    """Bright and dark images: separable."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 2
    return Split((torch.randint(0, 100, (100, 1, 4, 4)) + 150 * labels[:, None, None, None]).to(torch.uint8), labels)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_training_learns_and_logs_the_schedule(split):
    net, lines = network(), []
    best, state = fit(net, split, split, RECIPE, seed=1, on_epoch=lines.append)
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert best["val_accuracy"] > 95
    net.load_state_dict(state)
    assert evaluate(net, split).accuracy == best["val_accuracy"]


def test_the_seed_fixes_everything(split):
    runs = []
    for seed in (1, 1, 2):
        net = network()
        fit(net, split, split, RECIPE, seed=seed)
        runs.append(weights(net))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("tolerance", "kept"), [(0.0, 3), (1.0, 4)])
def test_one_standard_error_rule(monkeypatch, split, tolerance, kept):
    """80 % of 100 images has a standard error of 4 %: epoch 4 (77 %) is as good as epoch 3, epochs 1 and 2 are not."""
    accuracies = iter([50.0, 60.0, 80.0, 77.0])
    score = type("Score", (), {"loss": 1.0})
    monkeypatch.setattr("common.training.evaluate", lambda *_: type("S", (score,), {"accuracy": next(accuracies)})())
    best, _ = fit(network(), split, split, RECIPE, seed=0, tolerance=tolerance)
    assert best["epoch"] == kept


def test_without_validation_the_last_epoch_is_kept(split):
    net = network()
    best, state = fit(net, split, None, RECIPE, seed=0)
    assert best["epoch"] == RECIPE.epochs
    assert "val_accuracy" not in best
    assert torch.equal(weights(net), torch.cat([p.flatten() for p in state.values()]))


def test_evaluate_is_accuracy_and_cross_entropy(split):
    net = network()
    logits = net.eval()(split.images.float() / 255)
    score = evaluate(net, split, batch_size=33)
    assert score.accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).float().mean().item())
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-5)


def test_divergence_stops_after_the_last_good_epoch(split):
    kept = []
    recipe = Recipe(epochs=9, batch_size=20, lr=1e30, milestones=(), gamma=1, weight_decay=0)
    with pytest.raises(Diverged, match="not finite after epoch 1; lower --Lr"):
        fit(network(), split, split, recipe, seed=0, on_best=lambda figures, _: kept.append(figures))
    assert all(math.isfinite(figures["train_loss"]) for figures in kept)


def test_activations_are_paired_pooled_and_of_evaluation_mode(split):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, 2)
    )
    net.train()(torch.rand(50, 1, 4, 4))
    found = paired(net, ["3.weight", "5.weight"], split, batch_size=30)
    net.eval()
    with torch.no_grad():
        read = net[:3](split.images.float() / 255)
        returned = net[3](read)
    torch.testing.assert_close(found["3.weight"][0], read.mean((2, 3)))
    torch.testing.assert_close(found["3.weight"][1], returned.mean((2, 3)))
    assert found["5.weight"][1].shape == (100, 2)
