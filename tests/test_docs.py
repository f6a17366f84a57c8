"""The pages: links lead somewhere, code blocks run, tables are what records and declarations say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, model_of

import claims
import readme
from common import artifacts, cli, files, records

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "results" / "README.md",
    ROOT / "common" / "cmi" / "README.md",
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MINE = (ROOT / "docs" / "own_network.md").read_text(encoding="utf-8")
EXPORT = "needs packages of its own; tests/test_export.py runs stage 4"
NOT_RUN = {  # code blocks by how they begin: why no test runs them
    "python3 -m venv .venv": "installs packages; CI does, by make",
    "make demo": "CI runs these",
    "train_stage1.py ──": "a drawing",
    "cd resnet56": "days of a GPU; tests/test_convolutional_scripts.py runs the same scripts on a few images",
    "dask scheduler": "several machines; tests/test_cluster.py has a cluster on one",
    "@inproceedings": "a citation",
    "python export_stage4.py": EXPORT,
    "pip install -r requirements-export.txt": EXPORT,
    "import json\nimport numpy": EXPORT,
    "import torch\n\nnetwork = torch.export": EXPORT,
    "import onnxruntime": EXPORT,
    "python pruning_1b.py --key_id all --granularity": EXPORT,
}
SHORT = {  # what makes the commands of `mlp/` take seconds
    "train_stage1.py": "--Dataset DIGITS --Val_size 200 --Epoch 1 --Save_dir {out}/base",
    "pruning_1b.py": "--dataset DIGITS --samples_per_class 40 --weights_dir {out}/base/0",
    "retrain_stage3.py": "--Dataset DIGITS --Val_size 200 --Epoch 1 --Samples_per_class 40 --Save_dir {out}/pruned "
    "--Retrain {out}/base/0/logits_best.pkl --Retrain_mask {out}/base/0/I_parent_cmi.npy "
    "--Labels_file {out}/base/0/Labels_cmi.npy --Labels_children_file {out}/base/0/Labels_children_cmi.npy",
}


def prose(page):
    return re.sub(r"<!--.*?-->", "", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert "://" in link or path.exists(), link
        assert "://" in link or not anchor or anchor in anchors(path), link


def test_the_readme_is_one_screen_after_another_and_no_more():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("page", [PAGES[0], *PAGES[4:]], ids=named)
def test_code_blocks_are_run_or_listed(page):
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        run = (page.name == "own_network.md" and language in ("bash", "python")) or "cd mlp\n" in block
        assert run or any(block.startswith(beginning) for beginning in NOT_RUN), block


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/usage.md", marks=pytest.mark.slow)])
def test_the_three_commands_run(page, call_in, tmp_path):
    """As they stand, then made short: of flags that are given twice the last counts."""
    (block,) = (b for _, b in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")) if "cd mlp\n" in b)
    commands = re.findall(r"^(?:\$ )?python (\S+\.py)(.*)$", block.replace("\\\n", ""), re.MULTILINE)
    assert [script for script, _ in commands] == list(SHORT)
    for script, flags in commands:
        printed = call_in("mlp", script, *shlex.split(flags), *SHORT[script].format(out=tmp_path).split())
    assert "asked: 96.20 %" in printed


@pytest.mark.slow
def test_an_own_network_goes_all_the_way(tmp_path):
    for folder in ("common", "vgg16", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = "".join(block for language, block in BLOCK.findall(MINE) if language == "bash")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "-ec", script]
    done = subprocess.run(
        shell, cwd=tmp_path, env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "results" / "shapes" / "table.md").read_text(encoding="utf-8")
    assert all(f"| **{rule}** | 90.62 |" in table for rule in ("CMI, refit", "magnitude, refit", "random, refit"))


def test_scores_of_the_example_stand_out(capsys):
    ((_, block),) = (found for found in BLOCK.findall(MINE) if found[0] == "python")
    names = {}
    exec(block, names)
    assert names["scores"].shape == (2, 4)
    assert (names["scores"].argmax(1) == 0).all()


def test_a_difference_is_recomputed_as_the_page_says(monkeypatch, capsys):
    (block,) = (code for language, code in BLOCK.findall(PAGES[2].read_text(encoding="utf-8")) if language == "python")
    monkeypatch.chdir(ROOT)
    exec(block, {})
    assert capsys.readouterr().out.strip() == block.strip().rpartition("  # ")[2] == "8.79 ± 1.14, p = 0.0002"


def test_tables_of_the_pages_are_what_is_recorded_and_declared():
    """No number of the README's results, of the history and of the lists of flags is typed by hand."""
    for page, name, content in readme.contents():
        text = page.read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{content}<!-- end {name} -->" in text, name


def test_the_history_s_commands_retrain_for_as_long_as_its_runs():
    rows = [row for row in readme.history().splitlines() if "EPOCHS=" in row]
    assert {re.search(r"EPOCHS=(\d+)", row)[1] for row in rows} >= {"3", "30"}
    assert all(f"; {re.search(r'EPOCHS=([0-9]+)', row)[1]} epochs" in row for row in rows)


@pytest.mark.parametrize("path", readme.COMMITTED)
def test_committed_networks_are_those_of_their_records(path):
    """Loading compares the checksum; what the mask removes is 0."""
    model = json.loads((files.RESULTS / path).with_suffix(".json").read_text())["arguments"]["Model"]
    network = model_of(model).build(10)
    checkpoint = artifacts.load_weights(network, files.RESULTS / path)
    for key, mask in checkpoint.get("masks", {}).items():
        assert (network.get_parameter(key)[~mask] == 0).all()


PAPER = {"pruned_of": "masked_layers", "points": [{"accuracy": 98.0}, {"accuracy": 97.0, "pruned_percent": 90}]}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Writes runs of two networks at two shares, and the dense networks."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "COMMANDS", {"any": "any.sh"})
    readme.finished.cache_clear()

    def write(criterion, share, seed, accuracy, network=0, epochs=3, date="2026-01-01"):
        arguments = {
            "Criterion": criterion,
            "Refit": True,
            "Epoch": epochs,
            "Model": "net",
            "children_key": ["a.weight"],
        }
        arguments["Retrain"] = f"results/any/dense/{network}/logits_best.pkl"
        record = {"stage": 3, "status": "complete", "arguments": arguments, "requested_percent": share, "seed": seed}
        record |= {"pruned_percent_masked_layers": share, "pruned_percent_network": share / 2, "date": date}
        record |= {
            "test": {"accuracy": accuracy},
            "test_before_retraining": {"accuracy": accuracy - 10},
            "commit": "abc",
        }
        records.write(tmp_path / "any" / f"{criterion}_{share}_{seed}_{epochs}" / f"logits_{share:.2f}.json", record)

    for network in range(2):
        dense = {"stage": 1, "status": "complete", "best": {}, "test": {"accuracy": 98.0 + network}}
        records.write(tmp_path / "any" / "dense" / str(network) / "logits_best.json", dense)
    yield write
    readme.finished.cache_clear()


def row_of(monkeypatch):
    monkeypatch.setattr(readme, "NETWORKS", {"net": ("net", {"later": "CMI", "any": "CMI, refit"})})
    return readme.networks_table({"net": PAPER}).splitlines()[2].strip("| ").split(" | ")


def test_a_network_has_the_published_point_and_equal_controls_at_the_nearest_share(experiment, monkeypatch):
    """Of what both rules pruned; two runs of a network count once. Random blocks were not run."""
    for seed, accuracy in enumerate([95.0, 97.0, 93.0]):  # runs 0 and 1 of network 0: 96 on average
        experiment("cmi", 88, seed, accuracy, network=seed // 2)
        experiment("magnitude", 88, seed, accuracy - 1, network=seed // 2)
        experiment("cmi", 50, seed, 98.0)
    experiment("cmi", 88, 9, 10.0)  # magnitude has no such run
    cells = row_of(monkeypatch)
    assert cells[1:4] == [
        "98.00 → 97.00 (90.0 % of masked layers)",
        "CMI, refit",
        "88.0 % of masked layers, 44.0 % of all",
    ]
    assert cells[4:6] == ["3", "98.50 ± 0.71"]
    assert cells[6:] == ["84.5 → 94.50 ± 2.12", "83.5 → 93.50 ± 2.12", "not run yet", "2", "any: `any.sh`"]


def test_networks_without_records_or_without_retraining_say_so(experiment, monkeypatch):
    shutil.rmtree(files.RESULTS / "any")
    assert row_of(monkeypatch)[6] == "not run yet"
    readme.finished.cache_clear()
    experiment("cmi", 90, 0, 90.0, epochs=0)
    assert row_of(monkeypatch)[4:7] == ["0", "", "80.00"]


def test_the_history_is_of_days_that_were_better_than_all_before(experiment):
    for date, accuracies in {"2026-01-01": [90.0], "2026-01-02": [80.0], "2026-01-03": [91.0, 92.0]}.items():
        for accuracy in accuracies:
            experiment("cmi", 90, 0, accuracy, date=date, epochs=int(accuracy))
    experiment("magnitude", 90, 0, 99.0, epochs=0)  # apart from what was retrained
    lines = readme.history().splitlines()[2:]
    assert [line.split(" | ")[2:4] for line in lines] == [
        ["CMI, refit; 90 epochs", "90.00"],
        ["CMI, refit; 92 epochs", "92.00"],
        ["magnitude, refit; not retrained", "99.00"],
    ]


def test_every_flag_of_every_stage_is_on_the_page():
    usage = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert [name for name in cli.FLAGS if f"| `--{name}`" not in usage] == []
    assert readme.legal({"type": cli.COUNT, "nargs": "+"}) == "a whole number at least 1; one or more"
    assert readme.legal({"choices": ("a", "b")}) == "a, b"


def test_the_picture_has_the_same_bytes_every_time(tmp_path):
    readme.picture(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == (ROOT / "results" / "figures" / "method.svg").read_bytes()


def test_quick_claims_can_be_read():
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = claims.claims(page)
    assert len(rows) == page.split("## Quick")[1].split("## Long")[0].count("\n| ") - 1
    assert all(row["expected"] == "exit code 0" or claims.FIGURE.fullmatch(row["expected"]) for row in rows)


@pytest.mark.parametrize(
    ("expected", "code", "output", "good", "shown"),
    [
        ("1.00 ± 0.10", 0, "of 5 values\n0.93\n", True, "0.93"),
        ("1.00 ± 0.10", 0, "0.89", False, "0.89"),
        ("0.00 ± 0.00", 0, "0.0", True, "0"),
        ("0.00 ± 0.01", 0, "-3e-5", True, "-3e-05"),
        ("`accuracy` 97.5 ± 1", 0, "accuracy 50 %\naccuracy 97.00 % (epoch 5)", True, "97"),
        ("`accuracy` 97.5 ± 1", 0, "97.5", False, "no figure in the output"),
        ("`accuracy` 97.5 ± 1", 2, "accuracy 97.5", False, "exit code 2"),
        ("exit code 0", 0, "", True, "exit code 0"),
        ("exit code 0", 1, "", False, "exit code 1"),
    ],
)
def test_claims_are_judged_by_their_figures(expected, code, output, good, shown):
    assert claims.judge(expected, code, output) == (good, shown)


@pytest.mark.parametrize("number", ["0", "999", "x"])
def test_claims_that_are_not_there_are_refused(monkeypatch, number):
    """They passed: nothing was run, nothing failed."""
    monkeypatch.setattr("sys.argv", ["claims.py", number])
    with pytest.raises(SystemExit, match="2"):
        claims.main()
