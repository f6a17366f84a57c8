"""Stage 4: the shrunk network is the masked one, its files need nothing of this project, what is measured is true."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, model_of, record, shell
from torch import nn

from common import artifacts, export, records
from common.errors import InputError
from random_networks import own

STAGE2, STAGE3, STAGE4 = "pruning_1b.py", "retrain_stage3.py", "export_stage4.py"
TRAIN = "--Dataset DIGITS --Val_size 200".split()
EXPORT = "--Dataset DIGITS --Seconds 0".split()
NETWORKS = [
    "mlp",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16", "resnet50")),
    "resnet56",
]
SHAPE = {"mlp": (1, 28, 28), "vgg16": (3, 32, 32), "resnet56": (3, 16, 16), "resnet50": (3, 32, 32)}


@torch.no_grad()
def built(name):
    """A network with statistics of its own, and with dead inputs, outputs and weights."""
    torch.manual_seed(0)
    network = model_of(name).build(10).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    for weight in [parameter for parameter in network.parameters() if parameter.ndim > 1]:
        weight[:, torch.rand(weight.shape[1]) < 0.3] = 0
        weight[torch.rand(len(weight)) < 0.1] = 0
        weight[torch.rand(weight.shape) < 0.5] = 0
    return network


@torch.no_grad()
def shrunk(network, images):
    """The shrunk network and what is said of it, once it has the same outputs."""
    small, found = export.shrink(export.trace(network.eval(), images), images)
    expected = network(images)
    torch.testing.assert_close(small.module()(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    return dict(small.named_parameters()), found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_network_is_the_masked_one(name):
    network = built(name)
    weights, found = shrunk(network, torch.randn(4, *SHAPE[name]))
    for key, (before, after) in found["layers"].items():
        assert list(network.get_parameter(key).shape) == before
        assert list(weights[key].shape) == after != before
    inner = [child for child in getattr(model_of(name), "INNER", model_of(name).MAX_SPARSITY)]
    assert all(found["layers"][key][1][1] < found["layers"][key][0][1] for key in inner)
    assert sum(map(torch.Tensor.numel, weights.values())) < 0.8 * sum(p.numel() for p in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet56", "resnet50"])
def test_onnxruntime_is_torch(name):
    network, images = built(name), torch.randn(3, *SHAPE[name])
    small, _ = export.shrink(export.trace(network, images), images)
    content = export.onnx_bytes(small)
    for count in (1, 3):
        expected = network(images[:count]).detach()
        found = export.onnx_runner(content)(images[:count])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def dead_channel(bias, padding, norm=True):
    """Two convolutions; all weights of the first one's channel 1 are 0, and `bias` comes after batch norm."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 3, 3, padding=padding, bias=False)
    network = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(3 * (4 + 2 * padding) ** 2, 5))
    with torch.no_grad():
        first.weight[1] = 0
        network[1].bias[1] = bias
    return network


@pytest.mark.parametrize(("bias", "padding", "goes"), [(-0.5, 1, True), (0.5, 1, False), (0.5, 0, True)])
def test_constants_are_folded_where_that_is_exact(bias, padding, goes):
    """Negative: 0 after ReLU. Positive: what a padded convolution makes of it is another thing at the border."""
    weights, found = shrunk(dead_channel(bias, padding), torch.randn(4, 2, 6, 6))
    assert weights["3.weight"].shape[1] == weights["1.bias"].shape[0] == (3 if goes else 4)
    assert ("3.folded_bias" in weights) == (goes and bias > 0)
    assert bool(found["notes"]) == (not goes)


def test_constants_go_into_the_bias_of_a_linear_layer_through_flattened_maps():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        network[0].weight[0] = 0
    weights, _ = shrunk(network, torch.randn(4, 1, 6, 6))
    assert weights["4.weight"].shape == (4, 8)
    expected = network[4].bias + network[4].weight[:, :4].sum(1) * network[0].bias[0].sigmoid()
    torch.testing.assert_close(weights["4.bias"], expected)


class Residual(nn.Module):
    """A stage of one block; who reads the sum, and what is added, is the network's."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.last = nn.Linear(6, 2)

    def forward(self, images):
        x = self.stem(images)
        x = (x + self.conv2(self.conv1(x).relu_())).relu_()
        return self.last(x.mean((2, 3)))


def test_sums_lose_what_all_their_parts_can_spare():
    network = Residual()
    with torch.no_grad():
        network.last.weight[:, :3] = 0  # nobody reads these but conv1, of which
        network.conv1.weight[:, 1:4] = 0
    weights, _ = shrunk(network, torch.randn(4, 1, 5, 5))
    for key, axis in (("stem.weight", 0), ("conv1.weight", 1), ("conv2.weight", 0), ("last.weight", 1)):
        assert weights[key].shape[axis] == 4
    with torch.no_grad():
        network.conv1.weight[:, 0] = network.conv1.weight[:, 1:3] = 1.0
    assert not shrunk(network, torch.randn(4, 1, 5, 5))[1]["layers"]


class Between(nn.Module):
    """Two layers, and a function of the first one's maps or vectors between them."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, images):
        return self.second(self.between(self.first(images))).flatten(1)


@pytest.mark.parametrize("pool", ["max_pool", "avg_pool"])
def test_pooling_along_the_channels_keeps_what_is_pooled_with_others(pool):
    """As torch reads a tensor that lacks an axis: vectors (images, features), sequences (images, channels, length)."""
    vectors = Between(nn.Linear(6, 8), lambda x: getattr(nn.functional, f"{pool}1d")(x, 3, 1, 1), nn.Linear(8, 3))
    maps = Between(nn.Conv1d(2, 8, 1), lambda x: getattr(nn.functional, f"{pool}2d")(x, 3, 1, 1), nn.Conv1d(8, 3, 1))
    for network, images, axes in ((vectors, torch.randn(4, 6), 1), (maps, torch.randn(4, 2, 5), 2)):
        with torch.no_grad():
            network.second.weight[:, :3] = 0
        notes = [f"3 idle channels stay: needed by {pool}{axes}d"]
        assert shrunk(network, images)[1] == {"layers": {}, "notes": notes}


class Flattened(nn.Module):
    """A sum of 4 maps of 9 positions and 6 maps of 6."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 4, 2), nn.Conv2d(1, 6, (2, 3)), nn.Linear(36, 3)

    def forward(self, images):
        return self.last(self.a(images).flatten(1) + self.b(images).flatten(1))


def test_flattened_maps_of_other_sizes_lose_what_both_can_spare():
    network = Flattened()
    with torch.no_grad():
        network.last.weight[:, :18] = 0
    weights, _ = shrunk(network, torch.randn(4, 1, 4, 4))
    assert [len(weights[f"{name}.weight"]) for name in "ab"] == [2, 3]
    assert weights["last.weight"].shape[1] == 18


@pytest.mark.parametrize("change", [nn.functional.relu6, nn.functional.hardtanh, nn.functional.silu])
def test_channels_go_through_activations(change):
    network = Between(nn.Conv2d(1, 4, 1), change, nn.Conv2d(4, 3, 1))
    with torch.no_grad():
        network.second.weight[:, 1] = 0
    assert len(shrunk(network, torch.randn(4, 1, 3, 3))[0]["first.weight"]) == 3


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2).double()

    def forward(self, images):
        return self.conv(images.double()).mean((2, 3))


def test_what_onnxruntime_cannot_run_is_one_line():
    network, images = Doubled().eval(), torch.randn(4, 1, 3, 3)
    files = export.files(network, export.trace(network, images), {"format": "pt"})
    with pytest.raises(InputError, match=r"onnxruntime cannot run the network .*Could not find an implementation"):
        export.check(files, network, images)


def test_a_network_is_traced_in_evaluation_mode_and_from_one_image():
    network, image = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.BatchNorm1d(8)).train(), torch.randn(1, 6)
    found = export.trace(network, image).module()(image)
    torch.testing.assert_close(found, network.eval()(image))


@pytest.mark.parametrize("part", [lambda x: x[:, 0], lambda x: x.transpose(1, 2)[..., 1:, :, 1:]])
def test_what_is_changed_in_place_through_a_view_is_unknown(part):
    """Channel 0 is -1, as long as nothing is added to a part of it; the second layer's channel 0 reads that alone."""

    def change(x):
        part(x).add_(torch.ones(()))
        return x

    network = Between(nn.Conv2d(1, 4, 1), change, nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    with torch.no_grad():
        network.first.weight[0], network.first.bias[0] = 0, -1
        network.second[0].weight[0] = torch.tensor([1.0, 0, 0, 0])[:, None, None]
    shrunk(network, torch.randn(4, 1, 3, 3))


class Counts(nn.Module):
    """Changes a buffer in place whenever it runs, and what it returns depends on that."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, images):
        self.runs.add_(1).copy_(self.runs.fmod(3))
        return self.second(self.first(images).relu()) * self.runs


def test_buffers_stay_as_they_are():
    network, images = Counts(), torch.randn(4, 6)
    with torch.no_grad():
        network.second.weight[:, :3] = 0
        program = export.trace(network, images)
        before = [buffer.clone() for buffer in program.buffers()]
        small, _ = export.shrink(program, images)
        torch.testing.assert_close([list(program.buffers()), list(small.buffers())], [before, before])
        weights = dict(small.named_parameters())
    assert weights["first.weight"].shape == (5, 6)


def test_what_goes_takes_others_with_it():
    """The last of three layers reads one unit: of the two before only what leads there is left; one stays."""
    network = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        network[4].weight[:, 1:] = 0
        network[2].weight[0, 2:] = 0
    weights, _ = shrunk(network, torch.randn(4, 6))
    assert [tuple(weights[f"{k}.weight"].shape) for k in (0, 2, 4)] == [(2, 6), (1, 2), (3, 1)]
    with torch.no_grad():
        network[4].weight.zero_()
    weights, _ = shrunk(network, torch.randn(4, 6))
    assert [tuple(weights[f"{k}.weight"].shape) for k in (0, 2, 4)] == [(2, 6), (1, 2), (3, 1)]


class Joined(nn.Module):
    """Channels that no operation here keeps apart."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(8, 3)

    def forward(self, images):
        return self.last(torch.cat([self.one(images), self.two(images)], 1).relu().mean((2, 3)))


def test_what_cannot_go_stays_and_says_why():
    network = Joined()
    assert shrunk(network, torch.randn(4, 1, 5, 5))[1] == {"layers": {}, "notes": []}
    with torch.no_grad():
        network.last.weight[:, 1:3] = 0
    assert shrunk(network, torch.randn(4, 1, 5, 5))[1] == {
        "layers": {},
        "notes": ["2 idle channels stay: needed by cat"],
    }


@pytest.mark.parametrize("number", [pytest.param(k, marks=[pytest.mark.slow] * (k > 3)) for k in range(30)])
def test_random_networks_are_shrunk_rightly_or_refused(number):
    torch.manual_seed(number)
    rng, images = np.random.default_rng(number), torch.rand(3, 2, 8, 8)
    network = own(rng, images.clone())[0].eval()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for weight in [parameter for parameter in network.parameters() if parameter.ndim > 1]:
            weight[:, torch.rand(weight.shape[1]) < 0.3] = 0
            weight[torch.rand(len(weight)) < 0.3] = 0
        expected = network(images.clone())
        try:
            small, _ = export.shrink(export.trace(network, images), images)
        except InputError:
            return
        torch.testing.assert_close(small.module()(images.clone()), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16", "resnet56"))]
)
def test_torch_pruning_makes_the_same_network(name):
    """What nobody reads, by its dependency graph: the same shapes and the same outputs."""
    pruning = pytest.importorskip("torch_pruning")
    network, images = model_of(name).build(10).eval(), torch.randn(2, *SHAPE[name])
    pairs = [pair for pair in model_of(name).PAIRS if pair[1] in getattr(model_of(name), "INNER", pair[1:])][:9]
    pairs = [pair for pair in pairs if pair[0] != "input"]
    torch.manual_seed(0)
    with torch.no_grad():
        unread = {child: torch.rand(network.get_parameter(child).shape[1]) < 0.4 for _, child in pairs}
        for child, gone in unread.items():
            network.get_parameter(child)[:, gone] = 0
    weights, _ = shrunk(network, images)
    theirs = copy.deepcopy(network)
    graph = pruning.DependencyGraph().build_dependency(theirs, images)
    for parent, child in pairs:
        layer = theirs.get_submodule(parent.removesuffix(".weight"))
        cut = pruning.prune_conv_out_channels if layer.weight.ndim > 2 else pruning.prune_linear_out_channels
        graph.get_pruning_group(layer, cut, unread[child].nonzero().flatten().tolist()).prune()
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(weights[key], parameter, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned network, made by the commands."""
    folder = tmp_path_factory.mktemp("results")
    torch.manual_seed(0)
    torch.save({"state_dict": model_of("mlp").build().state_dict()}, folder / "dense.pkl")
    plain = "--Criterion magnitude --Granularity channel --Prune_per 0.962 --no-Refit --Epoch 0".split()
    flags = [*TRAIN, *plain, "--Retrain", folder / "dense.pkl", "--Save_dir", folder / "pruned"]
    printed = shell("mlp", STAGE3, *flags)
    path = folder / "pruned" / "0" / "logits_96.20.pkl"
    assert f"A mask alone makes nothing smaller or faster: python export_stage4.py --Checkpoint {path}" in printed
    return path


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


@pytest.fixture(scope="module")
def exported(pruned):
    """The files of stage 4, and what it printed."""
    said = shell("mlp", STAGE4, "--Dataset", "DIGITS", "--Checkpoint", pruned, "--Seconds", "0.01", "--Threads", 1, 2)
    return pruned.parent / "export" / "logits_96.20.safetensors", said


def test_the_loader_in_the_docs_reads_weights_without_this_project(exported, pruned, tmp_path):
    """In a fresh process that sees neither the project nor torch."""
    loader, *_ = re.findall(r"```python\n(import json.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    code = f"{loader}\nimport sys\nnp.savez('out.npz', **load(sys.argv[1]))\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, exported[0]], cwd=tmp_path, env=ENVIRONMENT, check=True)
    loaded, expected = np.load(tmp_path / "out.npz"), torch.load(pruned, weights_only=True)["state_dict"]
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(loaded[name], tensor.numpy(), strict=True)


def test_weights_cost_what_is_left_of_them(exported, pruned):
    state = torch.load(pruned, weights_only=True)["state_dict"]
    masked, rest = state.pop("fc2.weight"), sum(tensor.nbytes for tensor in state.values())
    assert exported[0].stat().st_size <= 1.1 * (4 * masked.count_nonzero() + masked.numel() / 8 + rest)


def test_the_shrunk_files_run_in_a_fresh_process(exported, pruned, tmp_path):
    images = torch.rand(5, 1, 28, 28)
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys, numpy as np, torch, onnxruntime\nimages = np.load('images.npy')\n"
        "network = torch.export.load(sys.argv[1]).module()\nsession = onnxruntime.InferenceSession(sys.argv[2])\n"
        "np.savez('out.npz', pt2=network(torch.from_numpy(images)).detach().numpy(),\n"
        "onnx=session.run(None, {session.get_inputs()[0].name: images})[0])"
    )
    files = [exported[0].with_suffix(suffix) for suffix in (".pt2", ".onnx")]
    subprocess.run([sys.executable, "-c", code, *files], cwd=tmp_path, env=ENVIRONMENT, check=True)
    network = model_of("mlp").build().eval()
    artifacts.load_weights(network, pruned)
    expected, found = network(images).detach().numpy(), np.load(tmp_path / "out.npz")
    for name in ("pt2", "onnx"):
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_record_and_the_table_say_what_was_measured(exported, pruned):
    path, printed = exported
    known = record(path)
    assert known["stage"] == 4
    assert list(known["inputs"].values()) == list(records.checksums(pruned).values())
    assert known["masked"]["parameters"] == 545_810
    assert known["masked"]["multiply_adds"] == 545_000
    assert known["masked"]["not_zero"] <= 545_810 - 0.962 * 150_000
    assert max(known["difference"].values()) <= 1e-5
    for suffix in (".safetensors", ".pt2", ".onnx"):
        assert known["bytes"][suffix] == path.with_suffix(suffix).stat().st_size
    assert known["bytes"]["dense"] == 4 * 545_810
    assert [(row["threads"], row["batch"]) for row in known["latency"]] == [(1, 1), (1, 64), (2, 1), (2, 64)]
    assert all(ms > 0 for row in known["latency"] for ms in row["ms"].values())
    assert "545,810" in printed
    assert "batch 64, threads 2, onnxruntime: dense" in printed
    weights = torch.export.load(path.with_suffix(".pt2")).state_dict
    before, after = known["layers"]["fc1.weight"]
    assert before == [500, 784]
    assert list(weights["fc1.weight"].shape) == after
    of = json.loads(export_metadata(path)["record"])
    assert of["stage"] == 3
    assert "epochs" not in of


def export_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata()


def test_weights_are_packed_to_the_same_bytes_every_time():
    from safetensors.torch import load

    state = {str(k): torch.full((3, 50), float(k % 2)) for k in range(9)}
    packed = {export.pack(state, {"format": "pt", "architecture": "é", "record": "{}"}) for _ in range(9)}
    assert len(packed) == 1
    assert len(load(*packed)) == 9 + 5


def test_finished_exports_are_not_repeated_and_not_overwritten(exported, pruned, call):
    path, before = exported[0], exported[0].stat().st_mtime_ns
    flags = ["--Dataset", "DIGITS", "--Checkpoint", pruned, "--Seconds", "0.01"]
    assert "is complete already" in call(STAGE4, *flags, "--Threads", 1, 2)
    assert "--Threads [1, 2] (now [1]); name another --Save_dir" in call(STAGE4, *flags, code=2)
    assert path.stat().st_mtime_ns == before


def test_a_dense_network_comes_out_whole_and_other_programs_weights_load(pruned, tmp_path, call):
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in model_of("mlp").build().state_dict().items()}
    torch.save({"net": state}, tmp_path / "weights.pth")
    printed = call(STAGE4, *EXPORT, "--Checkpoint", tmp_path / "weights.pth", "--Save_dir", tmp_path / "out")
    assert export.NOTHING in printed
    known = record(tmp_path / "out" / "weights.safetensors")
    assert known["masked"] == known["shrunk"]
    assert known["latency"] == []
    assert export_metadata(tmp_path / "out" / "weights.safetensors")["record"] == "{}"


def test_bad_files_are_one_line_and_code_2(pruned, tmp_path, call, monkeypatch):
    flipped = bytearray(pruned.read_bytes())
    flipped[5000] ^= 1
    (tmp_path / "a.json").write_bytes(records.sealed({"files": {"a.pkl": "0" * 64}}))
    (tmp_path / "b.json").write_bytes(records.sealed({"status": "running"}))
    weights = io.BytesIO()
    torch.save({"fc1.weight": torch.zeros(3, 3)}, weights)
    infinite = io.BytesIO()
    torch.save({name: value * torch.inf for name, value in model_of("mlp").build().state_dict().items()}, infinite)
    for name, content, message in (
        ("a.pkl", bytes(flipped), "a.pkl is damaged"),
        ("b.pkl", pruned.read_bytes(), "b.pkl is of a run that is not finished"),
        ("c.pkl", pickle.dumps(subprocess.run, protocol=2), "c.pkl is not a checkpoint of tensors and plain values"),
        ("d.pkl", pruned.read_bytes()[:-7], "d.pkl is not a checkpoint"),
        ("e.pkl", weights.getvalue(), "e.pkl is of another network: there fc1.weight is (3, 3)"),
        ("f.pkl", infinite.getvalue(), "fc1.weight holds values that are not finite"),
        ("absent.pkl", None, "absent.pkl does not exist"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        said = call(STAGE4, *EXPORT, "--Checkpoint", tmp_path / name, code=2)
        assert message in said
        assert len([line for line in said.splitlines() if line]) == 1
    link = tmp_path / "link.pkl"
    link.symlink_to(pruned)
    for folder in (tmp_path, pruned.parent):
        said = call(STAGE4, *EXPORT, "--Checkpoint", link, "--Save_dir", folder, code=2)
        assert "holds the checkpoint; name another directory" in said
    monkeypatch.setattr(export, "PACKAGES", ("safetensors", "no_such_package"))
    said = call(STAGE4, *EXPORT, "--Checkpoint", pruned, "--Save_dir", tmp_path / "out", code=2)
    assert "stage 4 needs no_such_package: pip install -r requirements-export.txt" in said
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "out").exists()


def test_a_network_with_other_outputs_is_not_written(pruned, tmp_path, call, monkeypatch):
    def wrong(program, images):
        module = program.module(check_guards=False)
        module.fc2.bias = nn.Parameter(module.fc2.bias + 1e-3)
        return export.trace(module, images), {"layers": {}, "notes": []}

    monkeypatch.setattr(export, "shrink", wrong)
    said = call(STAGE4, *EXPORT, "--Checkpoint", pruned, "--Save_dir", tmp_path / "out", code=2)
    assert "the .pt2 has other outputs, by " in said
    assert not (tmp_path / "out").exists()


def test_channels_from_the_shell(pruned, tmp_path, call):
    """Scores of one child group; whole columns go, and with them the layer before, whatever ranks them."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "logits_best.pkl").write_bytes((pruned.parents[2] / "dense.pkl").read_bytes())
    score = ["--dataset", "DIGITS", "--samples_per_class", 40, "--weights_dir", base, "--estimator", "gaussian"]
    call(STAGE2, *score, "--key_id", 0, "--granularity", "channel")
    call(STAGE2, *score, "--key_id", 1, "--granularity", "channel")
    assert np.load(base / "I_parent_cmi_fc1.weight_fc2.weight.npy").shape == (1, 500)
    assert np.load(base / "I_parent_cmi_fc2.weight_final.weight.npy").shape == (1, 300)
    channel = ["--Granularity", "channel", "--Retrain", base / "logits_best.pkl", "--Epoch", 0]
    both = "--parent_key fc1.weight fc2.weight --children_key fc2.weight final.weight".split()
    for criterion in ("cmi", "magnitude", "random", "taylor"):
        out = [*channel, *both, "--Criterion", criterion, "--Prune_per", 0.6, "--Save_dir", tmp_path / criterion]
        call(STAGE3, *TRAIN, *out, "--Samples_per_class", 40)
        (path,) = (tmp_path / criterion / "0").glob("*.pkl")
        columns = torch.load(path, weights_only=True)["masks"]["fc2.weight"]
        assert (columns == columns[:1]).all()
        assert record(path)["pruned_percent_masked_layers"] == pytest.approx(60, abs=0.2)
    call(STAGE4, *EXPORT, "--Checkpoint", path)
    kept = int(columns[0].sum())
    assert record(path.parent / "export" / path.name)["layers"]["fc1.weight"] == [[500, 784], [kept, 784]]
    said = call(STAGE3, *TRAIN, *channel, "--Prune_per", 0.5, "--children_clusters", 3, code=2)
    assert "--Granularity channel has one group of children: leave --children_clusters out" in said


def test_shares_of_multiply_adds(photographs, tmp_path, call_in):
    """By channels of a residual network: inner ones by default, a third of all its multiply-adds."""
    torch.manual_seed(0)
    model = model_of("resnet56")
    torch.save({"state_dict": model.build(2).state_dict()}, tmp_path / "weights.pkl")
    flags = [
        "--Data_dir",
        photographs,
        *"--Dims 2 --Val_size 4 --Epoch 0 --Samples_per_class 4".split(),
    ]
    prune = [*flags, "--Criterion", "random", "--Granularity", "channel", "--Retrain", tmp_path / "weights.pkl"]
    budget = ["--Prune_per", 0.2, "--Prune_of", "macs", "--Prune_of_network", "--Save_dir", tmp_path / "out"]
    printed = call_in("resnet56", STAGE3, *prune, *budget)
    assert "% of their multiply-adds)" in printed
    (path,) = (tmp_path / "out" / "0").glob("*.pkl")
    masks = torch.load(path, weights_only=True)["masks"]
    assert set(masks) == set(model.INNER) == {key for key in model.MAX_SPARSITY if key.endswith("conv2.weight")}
    side = {"layer1": 32, "layer2": 16, "layer3": 8}
    gone = sum(int((~mask).sum()) * side[key.split(".")[0]] ** 2 for key, mask in masks.items())
    network = {key: value for key, value in model.build(2).named_parameters() if value.ndim > 1}
    total = sum(value.numel() * side.get(key.split(".")[0], 32) ** 2 for key, value in network.items())
    total -= network["linear.weight"].numel() * (32**2 - 1)
    assert 0.2 <= gone / total < 0.2 + 16 * 9 * 32**2 / total
