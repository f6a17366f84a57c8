"""A training run: what it keeps, where it goes on, what makes it the same run."""

import contextlib
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import parallel, records, runs
from common.data import Data, Split
from common.errors import Diverged, InputError
from common.masks import Mask
from common.training import Metrics, evaluate, make_optimizer, make_schedule, train_epoch

IDENTITY = {"arguments": {"Lr": 0.1}, "inputs": {}, "code": {"model.py": "a", "train_stage1.py": "b"}, "common": "c"}


@pytest.fixture
def data():
    """Bright and dark images: separable."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 2
    split = Split((torch.randint(0, 100, (100, 1, 4, 4)) + 150 * labels[:, None, None, None]).to(torch.uint8), labels)
    return Data("BRIGHT", split, split, split, 2, None, "00", selection=split)


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def begin(folder, data, record=IDENTITY, **options):
    options = {"seed": 1, "select": "val", "resume": True, "remedy": "remove it", **options}
    return runs.start(folder / "logits_best.pkl", {"stage": 1, "data": data.describe(), **record}, data, **options)


def train(run, data, epochs=4, lr=0.1, stop=None, mask=None, average=False):
    """What a stage script does; killed before the end of epoch `stop`."""
    network = parallel.place(convolutional(), data.device)
    optimizer = make_optimizer("sgd", network.parameters(), lr, 1e-4, True)
    if mask is not None:
        mask.apply(network)
        mask.hold(network, optimizer)
    schedule = make_schedule(optimizer, "one-cycle", epochs, data.train.steps(20), [], 0.1, 0.3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    run.remember("test_at_first", network)
    kept, more = network, {}
    if average:
        mean = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
        optimizer.register_step_post_hook(lambda *_: mean.update_parameters(network))
        kept, more = mean.module, {"trained": network, "mean": mean}
    for epoch in run.epochs(epochs, kept, optimizer, schedule, **more):
        run.next_save = 0.0  # note every epoch
        metrics = train_epoch(network, optimizer, schedule, data.train.shuffled(20, run.seed_of(epoch)), loss)
        if epoch == stop:
            raise KeyboardInterrupt
        run.log(metrics, evaluate(kept, data.selection))
        if epoch == 1:
            run.remember("test_after_1_epoch", network)
    return run.finish(kept, data.test, last="logits_final.pkl")


def whole(folder, data, **options):
    with begin(folder, data, **options) as run:
        return train(run, data)


def killed(folder, data, stop=3, **options):
    with pytest.raises(KeyboardInterrupt), begin(folder, data, **options) as run:
        train(run, data, stop=stop)


def test_a_run_learns_and_its_record_holds_every_epoch(tmp_path, data, capsys):
    record = whole(tmp_path, data)
    written = records.read(tmp_path / "logits_best.json")
    assert record == {k: v for k, v in written.items() if k != "files"}
    assert [line["epoch"] for line in record["epochs"]] == [1, 2, 3, 4]
    assert record["test"]["accuracy"] > 90
    assert record["test_at_first"] != record["test_after_1_epoch"] != record["test"]
    assert not list(tmp_path.glob("*.state"))
    assert not list(tmp_path.glob(".*"))
    titles, *rows, last = capsys.readouterr().out.splitlines()[1:]
    assert titles.split() == "epoch lr train_loss train_accuracy val_loss val_accuracy seconds".split()
    assert {len(row) for row in (titles, *rows)} == {len(titles)}
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4]
    assert "logits_best.pkl: test accuracy " in last


def test_the_seed_fixes_everything(tmp_path, data):
    """First weights, order and dropout; the second is the same bytes, the third has another seed."""
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        with begin(tmp_path / name, data, seed=seed) as run:
            first = torch.rand(3)
            train(run, data)
        files.append((first, (tmp_path / name / "logits_best.pkl").read_bytes()))
    assert torch.equal(files[0][0], files[1][0])
    assert files[0][1] == files[1][1]
    assert not torch.equal(files[0][0], files[2][0])
    assert files[0][1] != files[2][1]


def test_a_finished_run_is_said_and_passed(tmp_path, data, capsys):
    whole(tmp_path, data)
    with begin(tmp_path, data) as run:
        assert run.finished
    assert "is complete already" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("select", ["val", "last"])
def test_going_on_gives_the_same_bytes(tmp_path, data, stop, select):
    """Weights, running statistics, momentum, schedule and figures."""
    if select == "last":
        data = Data("BRIGHT", data.train, data.val, data.test, 2, None, "00")
    found = whole(tmp_path / "whole", data, select=select)
    killed(tmp_path / "killed", data, stop=stop, select=select)
    with begin(tmp_path / "killed", data, select=select) as run:
        assert not run.finished
        again = train(run, data)
    for name in ("logits_best.pkl", "logits_final.pkl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()

    def measured(record):
        epochs = [{k: v for k, v in line.items() if k != "seconds"} for line in record["epochs"]]
        return epochs, [record[k] for k in ("test", "test_at_first", "test_after_1_epoch")], record["best"]["epoch"]

    assert measured(found) == measured(again)


def test_what_else_has_a_state_goes_on_too(tmp_path, data):
    """Averaged weights are kept; those that are trained and the number of averages go on with them."""
    for folder, stops in (("whole", [None]), ("killed", [3, None])):
        for stop in stops:
            with contextlib.suppress(KeyboardInterrupt), begin(tmp_path / folder, data) as run:
                train(run, data, stop=stop, average=True)
    states = [torch.load(tmp_path / name / "logits_final.pkl", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(value, states[1]["state_dict"][key]) for key, value in states[0]["state_dict"].items())


def test_without_resuming_it_starts_over(tmp_path, data, capsys):
    killed(tmp_path, data)
    capsys.readouterr()
    with begin(tmp_path, data, resume=False) as run:
        train(run, data)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 4


CHANGES = {
    "arguments": ({"arguments": {"Lr": 0.2}}, r"`Lr` 0\.1 \(now 0\.2\)"),
    "inputs": ({"inputs": {"a.pkl": "11"}}, r"another a\.pkl"),
    "edited model": ({"code": {"model.py": "x", "train_stage1.py": "b"}}, r"other code in model\.py"),
    "edited script": ({"code": {"model.py": "a", "train_stage1.py": "x"}}, r"other code in train_stage1\.py"),
    "other images": ({"data": {"name": "BRIGHT", "sha256": "11", "train": 100, "val": 100}}, "other data: sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused_and_nothing_is_overwritten(tmp_path, data, change, finished):
    (whole if finished else killed)(tmp_path, data)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    entries, message = CHANGES[change]
    with (
        pytest.raises(InputError, match=f"logits_best.pkl is of a run with {message}.*; remove it"),
        begin(tmp_path, data, IDENTITY | entries),
    ):
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_state_of_another_run_is_refused_too(tmp_path, data):
    """Also where its record is gone."""
    killed(tmp_path, data)
    for name in ("logits_best.json", "logits_best.pkl"):
        (tmp_path / name).unlink()
    with (
        pytest.raises(InputError, match=r"logits_best.state is of a run with `Lr` 0\.1 \(now 0\.2\)"),
        begin(tmp_path, data, IDENTITY | {"arguments": {"Lr": 0.2}}) as run,
    ):
        train(run, data)


@pytest.mark.parametrize("finished", [True, False])
def test_other_code_in_common_is_said_and_taken(tmp_path, data, finished, capsys):
    (whole if finished else killed)(tmp_path, data)
    capsys.readouterr()
    with begin(tmp_path, data, IDENTITY | {"common": "x"}) as run:
        assert run.finished == finished
        if not finished:
            train(run, data)
    assert "with other code in common/; it counts all the same" in capsys.readouterr().out


def test_what_an_older_record_does_not_know_is_not_different(tmp_path, data):
    record = whole(tmp_path, data)
    older = {k: v for k, v in record.items() if k not in ("code", "common", "processes")}
    records.write(tmp_path / "logits_best.json", older)
    with begin(tmp_path, data) as run:
        assert run.finished


@pytest.mark.parametrize(("select", "kept"), [("test", 3), ("val", 4)])
def test_one_standard_error_rule(tmp_path, data, select, kept):
    """80 % of 100 images has a standard error of 4 %: epoch 4 (77 %) is as good as epoch 3, epochs 1 and 2 are not."""
    with begin(tmp_path, data, select=select) as run:
        accuracies = dict(enumerate((50.0, 60.0, 80.0, 77.0), 1))
        for epoch in run.epochs(4, *parts()):
            run.log(Metrics(50.0, 1.0), Metrics(accuracies[epoch], 1.0))
        assert run.kept["epoch"] == kept


def test_without_selection_the_last_epoch_is_kept(tmp_path, data):
    data = Data("BRIGHT", data.train, data.val, data.test, 2, None, "00")
    record = whole(tmp_path, data, select="last")
    assert record["best"]["epoch"] == 4
    assert "val_accuracy" not in record["best"]
    best, last = (torch.load(tmp_path / f"logits_{name}.pkl", weights_only=True) for name in ("best", "final"))
    assert all(torch.equal(v, last["state_dict"][k]) for k, v in best["state_dict"].items())


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, data):
    with (
        pytest.raises(Diverged, match=r"not finite after epoch 1; lower `lr`.*Nothing kept"),
        begin(tmp_path, data) as run,
    ):
        train(run, data, lr=1e30)
    assert not list(tmp_path.iterdir())
    losses = iter((1.0, math.nan))

    def go(run):
        for _ in run.epochs(3, *parts()):
            run.log(Metrics(50.0, next(losses)), Metrics(50.0, 1.0))

    with pytest.raises(Diverged, match=r"not finite after epoch 2.*of epoch 1, is kept"), begin(tmp_path, data) as run:
        go(run)
    assert records.read(tmp_path / "logits_best.json")["status"] == "diverged"
    assert (tmp_path / "logits_best.pkl").is_file()


def parts():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    return network, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


def test_no_epochs_write_the_network_as_it_is(tmp_path, data):
    network, *others = convolutional(), *parts()[1:]
    wanted = evaluate(network, data.test)
    with begin(tmp_path, data) as run:
        assert list(run.epochs(0, network, *others)) == []
        record = run.finish(network, data.test, last="logits_final.pkl")
    assert record["test"]["accuracy"] == wanted.accuracy
    assert not (tmp_path / "logits_final.pkl").exists()


def test_an_epoch_that_is_not_logged_is_a_mistake(tmp_path, data):
    with pytest.raises(InputError, match=r"call run.log\(...\) in the loop"), begin(tmp_path, data) as run:
        list(run.epochs(2, *parts()))


def test_further_figures_have_a_column_and_are_recorded(tmp_path, data, capsys):
    with begin(tmp_path, data) as run:
        for _ in run.epochs(1, *parts()):
            run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0), kept_percent=12.5)
        assert run.lines[0]["kept_percent"] == 12.5
    titles, row = capsys.readouterr().out.splitlines()[1:3]
    assert "kept_percent" in titles
    assert "12.5" in row


@pytest.mark.parametrize("name", ["epoch", "lr", "train_loss", "val_accuracy", "seconds"])
def test_further_figures_do_not_replace_a_row_s_own(tmp_path, data, name):
    """The epoch of a row says which is kept and where a killed run goes on."""
    with begin(tmp_path, data) as run:
        next(run.epochs(1, *parts()))
        with pytest.raises(InputError, match=f"every row has {name} already"):
            run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0), **{name: 7.0})


def test_a_further_figure_that_is_not_finite_is_named(tmp_path, data):
    with begin(tmp_path, data) as run:
        next(run.epochs(1, *parts()))
        with pytest.raises(Diverged, match=r"^perplexity not finite after epoch 1"):
            run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0), perplexity=math.inf)


RETURNS = {  # what a network of two classes may return instead of (images, 2) floats
    "fewer": (lambda x: x[:, :1], r"returns \(2, 1\) in torch.float32 for 2 images; legal: floats \(2, 2\)"),
    "more": (lambda x: torch.cat([x, x], 1), r"returns \(2, 4\) in"),
    "maps": (lambda x: x[:, :, None, None], r"returns \(2, 2, 1, 1\) in"),
    "classes": (lambda x: x.argmax(1), r"returns \(2,\); legal: a tensor \(images, outputs\)"),
    "whole numbers": (lambda x: x.int(), r"returns \(2, 2\) in torch.int32"),
    "several": (lambda x: (x, x), "returns a tuple; legal"),
    "nothing": (lambda x: x.reshape(5, -1), r"cannot read images \(2, 1, 4, 4\) \(shape '\[5, -1\]' is invalid"),
}


@pytest.mark.parametrize("what", RETURNS)
def test_outputs_that_are_not_the_classes_are_refused_before_training(tmp_path, data, what):
    network, *others = parts()
    change, message = RETURNS[what]
    network.register_forward_hook(lambda module, read, returned: change(returned))
    with begin(tmp_path, data) as run, pytest.raises(InputError, match=message):
        next(run.epochs(1, network, *others))
    assert not list(tmp_path.glob("*.pkl"))


def test_a_run_whose_numbers_are_numpy_s_or_torch_s_goes_on(tmp_path, data):
    """Figures, the rate and what a schedule notes of it."""

    def train(stop):
        network = convolutional()
        optimizer = torch.optim.Adam(network.parameters(), torch.tensor(0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(1 / (1 + step)))
        with begin(tmp_path, data) as run:
            for epoch in run.epochs(3, network, optimizer, schedule):
                run.next_save = 0.0
                if epoch == stop:
                    return None
                optimizer.step()
                schedule.step()
                figures = {"norm": network[0].weight.norm(), "share": np.float64(0.5), "stop_epoch": np.float32(7)}
                run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0), **figures)
            return run.finish(network, data.test)

    train(stop=3)
    lines = train(stop=None)["epochs"]
    assert [line["lr"] for line in lines] == pytest.approx([1 / 2, 1 / 4, 1 / 6])
    assert all((line["share"], line["stop_epoch"]) == (0.5, 7) and line["norm"] > 0 for line in lines)


def test_a_mask_is_in_the_checkpoint_and_its_weights_are_zero(tmp_path, data):
    mask = Mask({"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)})
    mask["0.weight"][:2] = True
    with begin(tmp_path, data, IDENTITY | {"requested_percent": 50.0}, mask=mask) as run:
        record = train(run, data, mask=mask)
    saved = torch.load(tmp_path / "logits_best.pkl", weights_only=True)
    assert torch.equal(saved["masks"]["0.weight"], mask["0.weight"])
    assert (saved["state_dict"]["0.weight"][2:] == 0).all()
    assert record["pruned_percent_masked_layers"] == 50


@pytest.mark.parametrize(("name", "has_state"), [("average", False), ("lines", True), ("record", True)])
def test_what_cannot_be_in_the_state_of_a_run_is_refused_before_training(tmp_path, data, name, has_state):
    """It was a traceback after the first epoch, or, under a name that the run has too, when it went on."""
    network, optimizer, schedule = parts()
    more = {name: optimizer if has_state else 3}
    with begin(tmp_path, data) as run, pytest.raises(InputError, match=f"run.epochs: {name} has no state_dict, or a"):
        next(run.epochs(1, network, optimizer, schedule, **more))


def test_pruned_weights_that_come_back_are_no_result(tmp_path, data):
    """An average sees them before the mask is held, where its hook comes first."""
    mask = Mask({"1.weight": torch.zeros(2, 16, dtype=torch.bool)})
    network, optimizer, schedule = parts()
    with begin(tmp_path, data, mask=mask) as run:
        with pytest.raises(InputError, match="pruned weights are not 0 after epoch 0"):
            next(run.epochs(1, network, optimizer, schedule))
        mask.apply(network)
        next(run.epochs(1, network, optimizer, schedule))
        network[1].weight.data[1, 15] = 1e-9
        with pytest.raises(InputError, match=r"^1.weight: pruned weights are not 0 after epoch 1; call mask.apply"):
            run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0))
    assert not list(tmp_path.glob("*.pkl"))


WRAPPERS = {  # what is around a network has other names in the state_dict
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "OptimizedModule": partial(torch.compile, backend="eager"),
    "Graphed": parallel.Graphed,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_network_in_a_wrapper_is_refused_before_training(tmp_path, data, name):
    network, *others = parts()
    wrapped = WRAPPERS[name](network)
    if name == "Graphed":  # no capture without a GPU
        wrapped.forward = network.forward
    with begin(tmp_path, data) as run:
        for call in (lambda: next(run.epochs(1, wrapped, *others)), lambda: run.remember("test_it", wrapped)):
            with pytest.raises(InputError, match=f"the network is in a {name}; give the run what is in it"):
                call()


@pytest.mark.parametrize("value", ["text", None, torch.ones(2), [1.0]])
def test_a_further_figure_is_a_number(tmp_path, data, value):
    with begin(tmp_path, data) as run:
        next(run.epochs(1, *parts()))
        with pytest.raises(InputError, match=r"run.log: it is .*; legal: a number"):
            run.log(Metrics(50.0, 1.0), Metrics(50.0, 1.0), it=value)


def test_a_moment_does_not_replace_what_a_record_holds(tmp_path, data):
    with begin(tmp_path, data) as run, pytest.raises(InputError, match="'seed' is no name for a moment"):
        run.remember("seed", convolutional())


class TestCode:
    """What counts as an edit."""

    @pytest.fixture
    def script(self, tmp_path):
        (tmp_path / "script.py").write_text(
            '"""Doc."""\nRATE = 0.2  # why\n\n\ndef f(x):\n    """Doc."""\n    return x\n'
        )
        return tmp_path / "script.py"

    @pytest.mark.parametrize(
        ("old", "new", "same"),
        [
            ("# why", "# because", True),
            ("RATE = 0.2", "RATE = (\n    0.2\n)", True),
            ('"""Doc."""', '"""Another."""', True),
            ("\n", "\r\n", True),
            ("0.2", "0.5", False),
            ("return x", "return -x", False),
        ],
    )
    def test_comments_and_layout_do_not_count(self, script, tmp_path, old, new, same):
        other = tmp_path / "other.py"
        other.write_bytes(script.read_text().replace(old, new).encode())
        assert (records.syntax_hash(script) == records.syntax_hash(other)) == same

    def test_all_that_was_imported_from_the_folder_counts(self, script, tmp_path, monkeypatch):
        helper = tmp_path / "helper.py"
        helper.write_text("X = 1\n")
        assert set(records.code_of(script)["code"]) == {"script.py"}
        monkeypatch.setitem(sys.modules, "helper", SimpleNamespace(__file__=str(helper)))
        assert set(records.code_of(script)["code"]) == {"script.py", "helper.py"}
        (tmp_path / "parts").mkdir()
        helper.rename(tmp_path / "parts" / "helper.py")
        monkeypatch.setitem(sys.modules, "helper", SimpleNamespace(__file__=str(tmp_path / "parts" / "helper.py")))
        assert set(records.code_of(script)["code"]) == {"script.py", "parts/helper.py"}

    def test_imports_within_functions_and_beside_the_folder_count(self, script, tmp_path):
        """Also what these import, and __init__ files; not common/, which has an entry of its own, nor packages."""
        folder = tmp_path / "own"
        files = {
            "own/script.py": "import torch, common.data\n\n\ndef build():\n    from parts.late import x\n",
            "own/parts/__init__.py": "",
            "own/parts/late.py": "from . import further\nfrom .common import y\nfrom other.model import Block\n",
            "own/parts/further.py": "",
            "own/parts/common.py": "",
            "own/parts/unused.py": "",
            "other/model.py": "import numpy.linalg, beside\n",
            "beside.py": "",
            "common/data.py": "",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        counted = {"script.py", *(f"parts/{name}.py" for name in ("__init__", "late", "further", "common"))}
        counted |= {"../other/model.py", "../beside.py"}
        before = records.code_of(folder / "script.py")["code"]
        assert set(before) == counted
        (tmp_path / "beside.py").write_text("X = 1\n")
        after = records.code_of(folder / "script.py")["code"]
        assert {file for file in counted if before[file] != after[file]} == {"../beside.py"}
