"""Attacks on networks: closed forms, a literal version, invariants, and the script."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import model_of, record
from torch import nn

import figures
import report
import robustness
from common import records
from common.data import Split, load
from common.errors import InputError
from common.training import evaluate

FREE = torch.tensor(-torch.inf), torch.tensor(torch.inf)


@pytest.fixture
def curved():
    """A small smooth network in double precision, its input and labels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return network.eval().requires_grad_(False), torch.rand(6, 3, 2, 2).double(), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("step", [0.01, -0.01])
def test_of_a_linear_network_with_two_classes_the_attack_is_known(step):
    """The gradient has the sign of the difference of the classes' weights everywhere: five steps add up."""
    torch.manual_seed(1)
    network = nn.Linear(20, 2).double().eval().requires_grad_(False)
    images, labels = torch.rand(50, 20).double(), torch.arange(50) % 2
    changed = robustness.attack(network, images, labels, step, (torch.tensor(0.0), torch.tensor(1.0)))
    rise = (network.weight[1 - labels] - network.weight[labels]).sign()
    torch.testing.assert_close(changed, (images + 5 * step * rise).clamp(0, 1))


@pytest.mark.parametrize("step", [0.02, -0.02])
def test_the_same_as_one_image_at_a_time_by_finite_differences(step, curved):
    network, images, labels = curved
    changed = robustness.attack(network, images, labels, step, FREE)
    for image, label, end in zip(images, labels, changed, strict=True):
        now = image.clone()
        for _ in range(5):
            signs = torch.zeros_like(now)
            for place in torch.cartesian_prod(*(torch.arange(n) for n in now.shape)):
                ahead, behind = now.clone(), now.clone()
                ahead[tuple(place)] += 1e-5
                behind[tuple(place)] -= 1e-5
                rise = [F.cross_entropy(network(x[None])[0], label) for x in (ahead, behind)]
                signs[tuple(place)] = torch.sign(rise[0] - rise[1])
            now = now + step * signs
        torch.testing.assert_close(end, now)


@pytest.mark.parametrize("step", [0.001, 0.3, -0.3])
def test_images_stay_near_and_are_images(step, curved):
    network, images, labels = curved
    lowest, highest = torch.zeros(3, 1, 1), torch.tensor([1.0, 0.9, 0.8]).reshape(3, 1, 1)
    images = images.clamp(lowest, highest)
    before = images.clone()
    changed = robustness.attack(network, images, labels, step, (lowest, highest))
    assert ((changed - images).abs() <= 5 * abs(step) + 1e-12).all()
    assert ((changed >= lowest) & (changed <= highest)).all()
    assert not changed.equal(images)
    assert images.equal(before)
    assert not images.requires_grad


def test_one_attack_leaves_the_true_class_and_the_other_seeks_the_least_likely(curved, monkeypatch):
    network, images, labels = curved
    asked = []
    monkeypatch.setattr(robustness, "attack", lambda _, images, *given: asked.append(given) or images)
    split = Split((255 * images).byte(), labels)
    robustness.accuracies(network.float(), split, [0.1])
    ((images, _),) = split.batches()
    (true, up, _), (sought, down, _) = asked
    assert (up, down) == (0.1, -0.1)
    assert true.equal(labels)
    assert sought.equal(network(images).min(1).indices)


def test_what_pixels_can_be_is_known_after_normalising():
    mean, std = torch.tensor([0.5, 0.25]).reshape(2, 1, 1), torch.tensor([0.25, 0.5]).reshape(2, 1, 1)
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 2, 1, 1)
    ((images, _),) = Split(black_and_white, torch.zeros(2, dtype=torch.int64), mean, std).batches()
    torch.testing.assert_close(torch.stack(robustness.limits(Split(None, None, mean, std))), images)
    assert torch.stack(robustness.limits(Split(None, None))).tolist() == [0, 1]


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """A function of flags that attacks an MLP and returns the record; the network, its data and its checkpoint."""
    network = model_of("mlp").build()
    data = load("DIGITS", tmp_path, val_size=200, device=torch.device("cpu"))
    path = tmp_path / "logits_best.pkl"
    torch.save({"state_dict": network.state_dict(), "dataset": "DIGITS", "val_size": 200}, path)
    known = {"stage": 1, "status": "complete", "arguments": {"Dims": 10}, "seed": 7}
    records.write(records.record_path(path), known)
    monkeypatch.setattr(robustness, "TARGET", tmp_path / "attacks")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["robustness", "mlp", str(path), *map(str, flags)])
        robustness.main()
        return record(tmp_path / "attacks" / "logits_best.pkl")

    return run, network, data, path


def test_the_record_has_an_accuracy_by_attack_and_eps(attack, capsys):
    run, network, data, path = attack
    found = run("--eps", 1e-4, 0.2)
    clean = evaluate(network, data.test).accuracy
    for kind in robustness.ATTACKS:
        assert found[f"{kind}_0"]["accuracy"] == pytest.approx(float(clean))
    assert found["fgsm_0.2"]["accuracy"] < found["fgsm_0.0001"]["accuracy"] <= found["fgsm_0"]["accuracy"]
    assert (found["rule"], found["dense"], found["arguments"]["images"]) == ("dense", path.name, len(data.test))
    assert run("--eps", 1e-4, 0.2) == found
    assert "attacked already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"of a run with `eps` \[0.0001, 0.2\]"):
        run("--eps", 0.01)
    known = records.read(records.record_path(path))
    records.write(records.record_path(path), {**known, "status": "running"})
    with pytest.raises(InputError, match="no checkpoint of a finished run"):
        run()


def test_fewer_images_are_the_same_for_all_networks(attack):
    run, network, data, _ = attack
    found = run("--images", 40, "--eps", 0.01)
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:40]
    assert found["arguments"]["images"] == 40
    assert found["fgsm_0"]["accuracy"] == pytest.approx(float(evaluate(network, data.test[rows]).accuracy))


@pytest.mark.parametrize("flags", ["--images -5", "--images 0", "--eps nan", "--eps 0.1 -1"])
def test_senseless_numbers_are_refused(monkeypatch, flags):
    """-5 images were all but the last five."""
    monkeypatch.setattr("sys.argv", ["robustness.py", "mlp", "x.pkl", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        robustness.main()


def test_attacks_are_paired_by_dense_network(tmp_path):
    """CMI is ahead of magnitude by 1, 2, 3 points at eps 0.1; the eps are those that all records have."""
    found = []
    for name, gain in (("magnitude", 0), ("CMI", 1), ("dense", 5)):
        for k in range(3):
            run = {"stage": "attack", "rule": name, "dense": str(k), "arguments": {"Model": "net", "eps": [0.1]}}
            run |= {f"{kind}_0": {"accuracy": 90.0} for kind in robustness.ATTACKS}
            found.append(run | {f"{kind}_0.1": {"accuracy": 50.0 + gain * (k + 1)} for kind in robustness.ATTACKS})
    found[0]["arguments"]["eps"] = [0.05, 0.1]
    lines = report.attacks_table(found, "net").splitlines()
    assert lines[0] == "| accuracy (%) | attack | eps 0 | eps 0.1 | n |"
    assert lines[2] == "| dense | iterative FGSM | 90.00 ± 0.00 | 60.00 ± 5.00 | 3 |"
    assert lines[9] == "| CMI, ahead of | attack | eps 0 | eps 0.1 | n |"
    ahead = "+2.00 ± 0.58 (p = 0.074), no difference shown"
    assert f"| magnitude | iterative FGSM | +0.00 ± 0.00, no difference shown | {ahead} | 3 |" in lines
    assert report.attacks_table([], "net") == ""
    figures.attacks_figure(found, tmp_path / "attacks", {"net": "any"})
    assert (tmp_path / "attacks.svg").is_file()


def test_first_layers_are_counted_by_who_reads_them(tmp_path):
    """Unit 0 is read by both channels of a convolution, unit 1 by none, unit 2 at one tap by one."""
    mask = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    mask[:, 0], mask[1, 2, 1, 0] = True, True
    for name, more in (("dense", {}), ("pruned", {"masks": {"next": mask}})):
        torch.save({"state_dict": {"first": torch.arange(3.0)}, **more}, tmp_path / name)
    weights, readers = figures.first_layer(tmp_path / "dense", tmp_path / "pruned", "first", "next")
    assert (weights.tolist(), readers.tolist()) == ([0, 1, 2], [2, 0, 1])


def test_pictures_stand_beside_each_other(rng):
    tiles = rng.random((2, 3, 4, 5))
    picture = figures.beside(tiles, 1, 0.5)
    assert picture.shape == (10, 18)
    assert (picture[5:9, 12:17] == tiles[1, 2]).all()
    assert (picture[:, 5] == 0.5).all()
