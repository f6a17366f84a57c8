"""Training, evaluation and activations on a small problem."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from common import parallel
from common.activations import collect_activations
from common.data import Split
from common.errors import InputError
from common.training import evaluate, make_optimizer, make_schedule, set_dropout, train_epoch


@pytest.fixture
def split():
    """Bright and dark images: separable."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 2
    return Split((torch.randint(0, 100, (100, 1, 4, 4)) + 150 * labels[:, None, None, None]).to(torch.uint8), labels)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(net, split, *, name="steps", epochs=4, batch_size=20, label_smoothing=0.0, **options):
    """Train; returns the last epoch's metrics and the rate at the beginning of every epoch."""
    optimizer, rates = make_optimizer("sgd", net.parameters(), 0.1, 1e-4, True), []
    schedule = make_schedule(optimizer, name, epochs, split.steps(batch_size), [2, 3], 0.1, 0.3)
    loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="sum")
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        torch.manual_seed(epoch)
        metrics = train_epoch(net, optimizer, schedule, split.shuffled(batch_size, epoch), loss, **options)
    return metrics, rates


def test_training_learns(split):
    net = network()
    metrics, rates = train(net, split)
    assert evaluate(net, split).accuracy > 95
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert metrics.accuracy > 80


def test_figures_of_an_epoch_are_of_every_image_as_it_was_trained_on(split):
    """With a rate of 0: those of the network as it is, in training mode; the loss is the one that is trained on."""
    net = network().train()
    net[3].p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    schedule = make_schedule(optimizer, "cosine", 1, 5, [], 1, 0)
    for smoothing in (0.0, 0.2):
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum")
        metrics = train_epoch(net, optimizer, schedule, split.shuffled(20, 0), loss)
        logits = net(split.images.float() / 255)
        expected = nn.functional.cross_entropy(logits, split.labels, label_smoothing=smoothing).item()
        assert metrics.loss == pytest.approx(expected, rel=1e-5)
        assert metrics.accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).float().mean().item())


def test_distillation_is_a_share_of_the_loss(split):
    """With a rate of 0, against the definition: T^2 sum p log(p / q) of the softened answers, T = 4."""
    net, teacher = network().train(), network(1).train()
    net[3].p = 0.0
    teacher[4].weight.data *= 50  # one that is sure of its answers
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    schedule = make_schedule(optimizer, "cosine", 1, 5, [], 1, 0)
    loss = nn.CrossEntropyLoss(reduction="sum")
    logits = net(split.images.float() / 255).detach().double()
    p, q = ((values / 4).softmax(1) for values in (teacher.eval()(split.images.float() / 255).double(), logits))
    divergence, entropy = 16 * (p * (p / q).log()).sum() / 100, nn.functional.cross_entropy(logits, split.labels)
    for taught in (0.0, 0.3, 1.0):
        batches = split.shuffled(20, 0)
        metrics = train_epoch(net, optimizer, schedule, batches, loss, teacher.train(), taught)
        assert metrics.loss == pytest.approx(((1 - taught) * entropy + taught * divergence).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


LOSSES = {
    "module": (nn.CrossEntropyLoss(), "the loss has the reduction 'mean'; legal: 'sum'"),
    "function": (nn.functional.cross_entropy, "the loss has the reduction 'mean'"),
    "part": (partial(nn.functional.nll_loss, reduction="none"), "the loss has the reduction 'none'"),
    "sum": (partial(nn.functional.cross_entropy, reduction="sum"), None),
    "by image": (lambda logits, labels: logits.sum(1), r"the loss returns \(20,\); legal: one number"),
    "own": (lambda logits, labels: (logits.softmax(1) - nn.functional.one_hot(labels)).square().sum(), None),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_means_are_refused(split, kind):
    """They would be divided by the size of the batch once more."""
    loss, message = LOSSES[kind]
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    rest = optimizer, make_schedule(optimizer, "cosine", 1, 5, [], 1, 0), split.shuffled(20, 0), loss
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        train_epoch(net, *rest)


@pytest.mark.parametrize("form", [lambda y: nn.functional.one_hot(y, 2).float(), lambda y: (y, "more")])
def test_labels_may_be_shares_or_come_with_more(split, form):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    schedule, batches = make_schedule(optimizer, "cosine", 1, 5, [], 1, 0), list(split.shuffled(20, 0))
    changed, found = [(images, form(labels), rows) for images, labels, rows in batches], []
    for some in (batches, changed):
        torch.manual_seed(0)
        found.append(train_epoch(net, optimizer, schedule, some, lambda logits, labels: logits.square().sum()))
    assert found[0] == found[1]


WITH_ARGUMENTS = {"optimizer": ("LBFGS", "closure"), "schedule": ("ReduceLROnPlateau", "metrics")}


@pytest.mark.parametrize("part", WITH_ARGUMENTS)
def test_steps_take_no_arguments(split, part):
    net, (name, argument) = network(), WITH_ARGUMENTS[part]
    optimizer = torch.optim.LBFGS(net.parameters()) if part == "optimizer" else torch.optim.SGD(net.parameters(), 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(InputError, match=f"the step of {name}: missing a required argument: '{argument}'"):
        train_epoch(net, optimizer, plateau, split.shuffled(20, 0), lambda logits, labels: logits.sum())


def test_a_schedule_that_ends_before_training_does_is_refused(split):
    """One that is told of one step, where there are three batches; and one that is none."""
    net, loss = network(), lambda logits, labels: logits.sum()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 1)
    with pytest.raises(InputError, match=r"the schedule moves once per batch \(.*total steps is 1\); give it more"):
        train_epoch(net, optimizer, schedule, split.shuffled(20, 0), loss)
    with pytest.raises(InputError, match="the step of NoneType"):
        train_epoch(net, optimizer, None, split.shuffled(20, 0), loss)


def test_outputs_of_training_are_a_tensor(split):
    """Some networks return more in training mode than they do otherwise."""
    net = network()
    net.register_forward_hook(lambda module, read, returned: (returned, returned) if module.training else returned)
    with pytest.raises(InputError, match="in training the network returns a tuple; legal: a tensor"):
        train(net, split)


def test_layers_without_a_size_are_refused():
    with pytest.raises(InputError, match="run it once on images in model"):
        parallel.place(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), torch.device("cpu"))


@pytest.mark.parametrize("name", ["steps", "cosine", "one-cycle"])
def test_schedules_by_their_formulas(name):
    """10 epochs of 7 batches from .1: the rate of every batch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    schedule = make_schedule(optimizer, name, 10, 7, [4, 8], 0.1, 0.3)
    rates = []
    for _ in range(70):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    steps, pi = torch.arange(70.0), torch.pi
    expected = {
        "steps": 0.1 * 0.1 ** ((steps >= 28).float() + (steps >= 56).float()),
        "cosine": 0.05 * (1 + torch.cos(pi * steps / 70)),
        "one-cycle": torch.where(
            steps <= 20,
            0.004 + 0.048 * (1 - torch.cos(pi * steps / 20)),
            4e-7 + (0.1 - 4e-7) / 2 * (1 + torch.cos(pi * (steps - 20) / 49)),
        ),
    }[name]
    assert rates == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-7)
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("warm_up", [0, 0.1, 0.3, 1])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_warm_up_gives_rates(warm_up, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = make_schedule(optimizer, "one-cycle", 1, steps, [], 1, warm_up)
    for _ in range(steps):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 0.1
        optimizer.step()
        schedule.step()


def test_evaluate_is_accuracy_and_cross_entropy(split):
    net = network()
    logits = net.eval()(split.images.float() / 255)
    metrics = evaluate(net, split, batch_size=33)
    assert metrics.accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).float().mean().item())
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-5)
    assert metrics.right == "".join("01"[hit] for hit in (logits.argmax(1) == split.labels).tolist())
    assert evaluate(net, None) is None


def test_activations_are_paired_pooled_and_of_evaluation_mode(split):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, 2)
    )
    net.train()(torch.rand(50, 1, 4, 4))
    found = collect_activations(net, ["3.weight", "5.weight"], split, batch_size=30)
    net.eval()
    with torch.no_grad():
        read = net[:3](split.images.float() / 255)
        returned = net[3](read)
    torch.testing.assert_close(found["3.weight"][0], read.mean((2, 3)))
    torch.testing.assert_close(found["3.weight"][1], returned.mean((2, 3)))
    assert found["5.weight"][1].shape == (100, 2)


def test_bfloat16_keeps_weights_in_single_precision(split):
    net = network()
    train(net, split, amp=True)
    assert evaluate(net, split).accuracy > 95
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_compiled_training_trains_the_network_itself(split):
    """Through torch.compile's own machinery, with a backend that needs no compiler."""
    net, alike, seen = network(), network(), []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    compiled = parallel.wrap(net, compile=True, backend=backend)
    train(compiled, split)
    train(alike, split)
    assert seen
    assert "_orig_mod.1.weight" not in net.state_dict()
    for key, value in alike.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value)


def test_top_5():
    logits = torch.eye(8)[torch.arange(8)] * 8 + torch.arange(8.0)  # the image's own class first, then 7, 6, 5, ...
    labels = torch.tensor([0, 1, 2, 7, 3, 4, 0, 5])
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 8, bias=False))
    net.forward = lambda images: logits
    metrics = evaluate(net, Split(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), labels))
    assert metrics.accuracy == 100 * 3 / 8
    assert metrics.top5 == 100 * 7 / 8  # all but the seventh, whose five are 6, 7, 5, 4, 3


def test_dropout_rates_are_set_or_left():
    assert set_dropout(network(), 0.5)[3].p == 0.5
    assert set_dropout(network(), 0.0)[3].p == 0.0
    assert set_dropout(network(), None)[3].p == 0.2


def test_a_batch_size_without_a_batch_is_refused():
    split = Split(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="`batch_size` 8: no batch of 1 images"):
        split.steps(8)
    assert [Split(split.images.expand(n, 1, 2, 2), torch.zeros(n)).steps(8) for n in (2, 8, 9, 10, 16)] == [
        1,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize("difference", ["a value", "a shape", "a name"])
def test_processes_that_differ_are_refused(monkeypatch, difference):
    """Two processes with masks of their own, in turn: each sees the other's hash."""
    mine = {"fc2.weight": torch.tensor([True, False])}
    other = {
        "a value": {"fc2.weight": torch.tensor([True, True])},
        "a shape": {"fc2.weight": torch.tensor([True, False, False])},
        "a name": {"fc3.weight": torch.tensor([True, False])},
    }[difference]
    monkeypatch.setattr(parallel, "size", lambda: 2)
    hashes = []

    def gather(found, own):
        hashes.append(own)
        found[:] = [own, hashes[0]]

    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
    parallel.assert_in_sync(mine)
    parallel.assert_in_sync({"fc2.weight": torch.tensor([True, False])})
    with pytest.raises(RuntimeError, match="processes differ in fc"):
        parallel.assert_in_sync(other)
