"""Training, evaluation and activations on a small problem."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from common import artifacts, parallel
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


def test_going_on_from_a_saved_state_gives_the_same_bits(split):
    """Weights, running statistics and figures; the state went through a file."""

    def convolutional():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2)]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    split, states = replace(split, augment=True), []
    whole, resumed = convolutional(), convolutional()

    def on_state(state):
        states.append(torch.load(io.BytesIO(artifacts.checkpoint_bytes(state())), weights_only=True))

    best, state = fit(whole, split, split, RECIPE, seed=1, on_state=on_state)
    found, found_state = fit(resumed, split, split, RECIPE, seed=1, start=states[1])
    assert [s["epoch"] for s in states] == [1, 2, 3, 4]
    assert {k: v for k, v in best.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
        assert torch.equal(state[key], found_state[key])


def test_bfloat16_keeps_weights_in_single_precision(split):
    net = network()
    best, _ = fit(net, split, split, replace(RECIPE, amp=True), seed=1)
    assert best["val_accuracy"] > 95
    assert weights(net).dtype == torch.float32


def test_compiled_training_goes_through_torch_compile(split, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    fit(network(), split, split, replace(RECIPE, compile=True), seed=1)
    assert len(compiled) == 1


def test_top_5():
    logits = torch.eye(8)[torch.arange(8)] * 8 + torch.arange(8.0)  # the image's own class first, then 7, 6, 5, ...
    labels = torch.tensor([0, 1, 2, 7, 3, 4, 0, 5])
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 8, bias=False))
    net.forward = lambda images: logits
    score = evaluate(net, Split(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), labels))
    assert score.accuracy == 100 * 3 / 8
    assert score.top5 == 100 * 7 / 8  # all but the seventh, whose five are 6, 7, 5, 4, 3


def test_processes_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    others = []
    monkeypatch.setattr(
        parallel.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own, *others])
    )
    mask = {"fc2.weight": torch.tensor([True, False])}
    parallel.check_same(mask)
    others.append("another hash")
    with pytest.raises(RuntimeError, match=r"processes differ in fc2.weight"):
        parallel.check_same(mask)
