"""The flags of all scripts, each declared once, and what they ask for as objects. Nothing else knows a flag's name.

Errors of other modules speak of `parameters`; `run` says them by the names of the running script's flags.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import artifacts, cluster, export, parallel, records, runs, scoring
from common.activations import output_layer, output_positions, run_order
from common.cmi import ESTIMATORS, kde
from common.cmi.inputs import out_of_memory, processors
from common.data import Data, FileSplit, Split, load, sample_per_class
from common.datasets import DATASETS, torchvision
from common.errors import Diverged, InputError, reason
from common.files import ROOT, display_path, file_lock, real, under_results
from common.masks import CRITERIA, Blocks, Mask, contiguous_blocks, weight_count
from common.runs import Run, trained_on
from common.scoring import LayerPair
from common.training import OPTIMIZERS, SCHEDULES, set_dropout


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False, word: str = "") -> Callable:
    """An argparse type: a finite number from `low` (or above it) to `high`, or a word."""

    most = f" and at most {high:g}" if high != float("inf") else ""
    name = {int: "a whole number", float: "a number"}[kind]
    legal = f"{name} {'above' if above else 'at least'} {low:g}{most}" + f", or {word}" * bool(word)

    def parse(text: str):
        if word and text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {legal}") from None
        if not low <= value <= high or (above and value == low) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {legal}")
        return value

    return parse


def folder(text: str) -> Path:
    """An argparse type: a path, from where the script is run."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the path is empty" if not text else "the path holds a zero byte")
    return Path(text)


def results_path(text: str) -> Path:
    """An argparse type: a path, under `results/` if it is relative."""
    return under_results(folder(text))


def plain_name(text: str) -> str:
    """An argparse type: a part of a file name."""
    if not text or not all(c.isalnum() or c in "._-" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} may hold letters, digits, '.', '_' and '-' only")
    return text


def weights_source(text: str) -> Path | str:
    """An argparse type: a path as `results_path`, or "torchvision"."""
    return text if text == "torchvision" else results_path(text)


def address(text: str) -> str:
    """An argparse type: where a scheduler listens, as it prints it."""
    if not re.fullmatch(r"(tcp|tls)://\S+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not tcp://HOST:PORT")
    return text


MOST = 2**31 - 1
COUNT, SHARE, INDEX = number(int, 1, MOST), number(float, 0, 1), number(int, 0, MOST)
POSITIVE = number(float, 0, above=True)
CORES = processors()
MANY = {"nargs": "+"}
GPU = "number of the CUDA GPU, if any; under torchrun by process"
COMPILE = "train through torch.compile: slow to start; --no-Compile: nor by the CUDA graphs that a single GPU replays"
GRAINS = "blocks, or whole input channels: all children are one group, every parent one; residual sums stay"
KERNEL_WIDTH = f"kde: kernel width / sqrt(parent units), or the likeliest of few units (default: {kde.WIDTH})"
BY_LAYER = "one for all pairs, or one per pair (default: model.py's, by layer)"
GO_ON = "the same command goes on from what is written"
SWITCH, ON = {"action": argparse.BooleanOptionalAction}, {"action": "store_true"}


def _flag(stages: str, kind, help_: str, default=None, **options) -> dict:
    typed = {"choices": kind} if isinstance(kind, (tuple, dict)) else {"type": kind}
    return {"stages": stages, **({} if kind is None else typed), "help": help_, "default": default, **options}


def _everywhere(name: str, *flag, stages: str = "134", **options) -> dict:
    """A flag that stage 2 has too, and spells in lower case."""
    return {name: _flag(stages, *flag, **options), name.lower(): _flag("2", *flag, **options)}


EVERYDAY = {
    "Checkpoint": _flag("4", results_path, "the weights to export: of stage 1 or 3, or another program's"),
    "Save_dir": _flag("134", results_path, "runs go to SAVE_DIR/0, SAVE_DIR/1, ...; stage 4: the files"),
    "Epoch": _flag("13", COUNT, "epochs"),
    "Batch_size": _flag("13", COUNT, "images per step, over all processes"),
    "Lr": _flag("13", POSITIVE, "learning rate; with --Schedule one-cycle its peak"),
    **_everywhere("Dataset", DATASETS, "data set"),
    **_everywhere("Data_dir", folder, "where data sets lie, and are downloaded to if absent", ROOT / "data"),
    "Seed": _flag("13", INDEX, "seed of the first run", 0),
    "Expt_rerun": _flag("13", COUNT, "number of runs, with seeds SEED, SEED + 1, ...", 1),
    "Select": _flag("13", ("val", "last", "test"), "epoch kept: best on held-out images, last, best on test", "val"),
    "key_id": _flag("23", INDEX, "from 0, stage 2: the pair of PAIRS, or 'all'; stage 3: the share of the grid"),
    "weights_dir": _flag("2", results_path, "where the checkpoint lies and the scores go"),
    "name_postfix": _flag("2", plain_name, "tells score files of one directory apart", "cmi"),
    "samples_per_class": _flag("2", COUNT, "training images of each class to score with"),
    "estimator": _flag("2", tuple(ESTIMATORS), "estimator of the conditional mutual information", "kde"),
    "cores": _flag("2", COUNT, "parallel workers", CORES),
    "Retrain": _flag("3", results_path, "the checkpoint to prune"),
    "Prune_per": _flag("3", SHARE, "the pruned share itself, instead of the grid and KEY_ID"),
    "Prune_of": _flag("3", ("weights", "macs"), "pruned shares count weights, or their multiply-adds", "weights"),
    "Prune_of_network": _flag("3", None, "pruned shares are of the whole network, not of the masked layers", **ON),
    "Criterion": _flag("3", CRITERIA, "what ranks the blocks: scores, also times mean weight, or a control", "cmi"),
}
PRUNING = {
    **_everywhere("Granularity", ("block", "channel"), GRAINS, "block", stages="3"),
    "children_key": _flag("3", None, "the layers that are pruned (default: the MAX_SPARSITY of model.py)", **MANY),
    "parent_key": _flag("3", None, "what each of them reads (default: by PAIRS of model.py)", **MANY),
    "parent_clusters": _flag("23", COUNT, f"number of groups of parents: {BY_LAYER}", **MANY),
    "children_clusters": _flag("23", COUNT, f"the same of children, in the last layer the classes: {BY_LAYER}", **MANY),
    "grouping": _flag("2", ("index", "correlation"), "units of a group: neighbours (default), or those that correlate"),
    "lower_prune_per": _flag("3", SHARE, "start of the grid of pruned shares"),
    "upper_prune_per": _flag("3", SHARE, "end of the grid of pruned shares"),
    "prune_per_step": _flag("3", number(float, 1e-4, 1), "step of the grid of pruned shares"),
    "upper_prune_limit": _flag("3", SHARE, f"largest pruned share of a layer: {BY_LAYER}", **MANY),
    "Even": _flag("3", None, "spread the kept blocks evenly over child and parent groups", False, **SWITCH),
    "Refit": _flag("3", None, "refit the kept weights by least squares before retraining", False, **SWITCH),
    "Samples_per_class": _flag("3", COUNT, "training images of each class for batch norm, refit and taylor"),
    "Retrain_mask": _flag("3", results_path, "the scores: DIR/I_parent_<postfix>.npy (cmi: beside RETRAIN)"),
    "Labels_file": _flag("3", results_path, "DIR/Labels_<postfix>.npy (default: beside the scores)"),
    "Labels_children_file": _flag("3", results_path, "DIR/Labels_children_<postfix>.npy (default: beside the scores)"),
    "sampling": _flag("2", ("means", "positions"), "maps count as their means, or at random positions", "means"),
    "positions": _flag("2", COUNT, "--sampling positions: how many of every image's map", 1),
    "given": _flag("2", ("rest", "kept"), "gaussian: given all other parents, or those not yet pruned"),
    "width": _flag("2", number(float, 1e-6, 1e6, word="auto"), KERNEL_WIDTH),
    "precision": _flag("2", tuple(kde.PRECISIONS), "kde: arithmetic of the scores (default: single)"),
    "split_half": _flag("2", None, "also score two halves of the images; report their agreement", **ON),
    "bootstrap": _flag("2", number(int, 2), "also standard errors of the scores, from so many halves of the images"),
    "null": _flag("2", COUNT, "also the scores' distribution without dependence, from so many permutations"),
}
RECIPE = {
    "Opt": _flag("13", OPTIMIZERS, "optimizer; sgd has momentum 0.9"),
    "Nesterov": _flag("13", None, "Nesterov momentum", **SWITCH),
    "Weight_decay": _flag("13", number(float, 0), "weight decay"),
    "Schedule": _flag("13", SCHEDULES, "rate: falls at MILESTONES; a cosine to 0; up from LR/25, then to 0", "steps"),
    "Milestones": _flag("13", COUNT, "epochs after which the learning rate is multiplied by GAMMA", nargs="*"),
    "Gamma": _flag("13", POSITIVE, "factor of the learning rate at the milestones"),
    "Warm_up": _flag("13", SHARE, "one-cycle: share of the epochs in which the learning rate rises", 0.3),
    "Label_smoothing": _flag("13", number(float, 0, 0.99), "share of every label that is spread over all classes", 0.0),
    "Distillation": _flag("3", SHARE, "share of the loss: how far the answers are from those of RETRAIN (Hinton)", 0.0),
    "Dropout": _flag("13", number(float, 0, 0.99), "rate of all dropout layers (default: model.py's)"),
    "Weights": _flag("1", weights_source, "do not train: evaluate and write this file's weights, or 'torchvision'"),
    "Init": _flag("1", weights_source, "start from the weights of this file, or 'torchvision'"),
}
DATA = {
    "Val_size": _flag("13", INDEX, "training images held out to choose the best epoch by"),
    **_everywhere("Classes", None, "images of these classes only; outputs stay those of all (default: all)", **MANY),
    **_everywhere("Skip_unreadable", None, "leave out image files that cannot be read, naming them", **ON),
    "seed": _flag("2", INDEX, "seed of the drawn images", 0),
    "weights_file": _flag("2", plain_name, "name of the checkpoint (default: logits_best.pkl)"),
    **_everywhere("Dims", COUNT, "number of classes"),
    **_everywhere("Model", None, "the network of this folder"),
}
MACHINE = {
    **_everywhere("Device_ids", INDEX, GPU, [0], stages="13", **MANY),
    "device": _flag("2", ("cpu", "cuda"), "kde: where the scores are computed (default: cpu)"),
    "scheduler": _flag("2", address, "compute the scores on the workers of this Dask scheduler, tcp://HOST:PORT"),
    "Threads": _flag("4", number(int, 1, 1024), "CPU threads of the latency, one number after the other", [1], **MANY),
    "Seconds": _flag("4", number(float, 0), "of measuring per batch size and number of threads; 0: none", 10.0),
    "Workers": _flag("134", number(int, 0, 1024), "processes that read images that are not in memory", min(8, CORES)),
    "Amp": _flag("13", None, "train in bfloat16 where safe (default: on GPUs that have it)", **SWITCH),
    "Compile": _flag("13", None, COMPILE, **SWITCH),
    "Resume": _flag("13", None, "go on where a killed run was", True, **SWITCH),
}
HELP = {
    "everyday": EVERYDAY, "layers, groups and scores": PRUNING, "recipe": RECIPE, "data": DATA, "machine": MACHINE
}  # fmt: skip
FLAGS = {name: flag for group in HELP.values() for name, flag in group.items()}
# Not recorded: what makes no difference to the result; what is younger than the first records and as it was then.
UNRECORDED = {"stage", "code", "cores", "Expt_rerun", "Device_ids", "device_ids", "Data_dir", "data_dir", "Workers"}
UNRECORDED |= {"Resume", "key_ids", "scheduler"}
AS_EVER = {"Granularity": "block", "granularity": "block", "Prune_of": "weights", "Distillation": 0.0}
AS_EVER |= {"Schedule": "steps", "Warm_up": 0.3, "Label_smoothing": 0.0, "sampling": "means", "positions": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        words = message.lower().split()
        meant = [name for name, flag in FLAGS.items() if f"--{name}".lower() in words and _stage in flag["stages"]]
        hint = f"; meant --{meant[0]}?" if message.startswith("unrecognized") and meant else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")


def parse(script: str, doc: str, model: ModuleType, stage: int, argv: list[str] | None = None) -> Namespace:
    """Parse a script's flags, whose defaults are the values of its model.py, and refuse what cannot be."""
    global _stage
    _stage = str(stage)
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(usage="%(prog)s [--FLAG VALUE ...]", description=doc, formatter_class=raw, allow_abbrev=False)
    _check_model(model, Path(script))
    defaults = _defaults(model, stage)
    for title, flags in HELP.items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            if _stage in flag["stages"]:
                options, default = _options(name, flag, defaults)
                group.add_argument(f"--{name}", **options).default = default  # of a switch argparse would say it again
    args = parser.parse_args(argv)
    if stage in (2, 4) and parallel.size() > 1:
        cores = "one process that uses all cores (--cores)" if stage == 2 else "one process"
        raise InputError(f"stage {stage} is {cores}; start it without torchrun")
    gpus, classes = ("device_ids", "classes") if stage == 2 else ("Device_ids", "Classes")
    given = vars(args)
    if len(given.setdefault(gpus, [0])) > 1:
        raise InputError(f"--{gpus} {_shown(given[gpus])}: one GPU a process; for several use torchrun")
    given[gpus], given[classes] = given[gpus][0], given[classes] and list(dict.fromkeys(given[classes]))
    args.stage, args.code = stage, records.code_of(Path(script).resolve())
    if stage == 1:
        _check_build(args, model)
    {1: _check_training, 2: _check_scoring, 3: _check_pruning, 4: _check_exporting}[stage](args, model)
    return args


HYPERPARAMETERS = "Dataset Dims Epoch Batch_size Lr Milestones Gamma Opt Nesterov Weight_decay Val_size".split()
TABLES = {"TRAINING": HYPERPARAMETERS, "SCORING": ("samples_per_class",), "RETRAINING": HYPERPARAMETERS}  # of model.py
NEEDED = {"NAME": str, "PAIRS": list, **dict.fromkeys((*TABLES, "GROUPS", "MAX_SPARSITY"), dict), "build": Callable}
_stage = "1"  # of the script that runs: whose flags errors speak of


def _check_model(model: ModuleType, script: Path) -> None:
    """Refuse a model.py without what everything needs, or the augmentation that its script asks for."""
    augmenting = ["augment"] * ("model.augment" in script.read_text(encoding="utf-8"))
    if missing := [name for name in (*NEEDED, *augmenting) if not hasattr(model, name)]:
        raise InputError(f"model.py lacks {', '.join(missing)}; docs/own_network.md has all that it holds")
    for name, kind in NEEDED.items():
        if not isinstance(value := getattr(model, name), kind) or not value:
            raise InputError(f"model.py: {name} is {value!r}; legal: a {kind.__name__.lower()}, not empty")
    for name, least in TABLES.items():
        _check_values(f"model.py: {name}", getattr(model, name))
        if missing := [flag for flag in least if flag not in getattr(model, name)]:
            raise InputError(f"model.py: {name} lacks {', '.join(missing)}")
    _check_layers(model)


def _check_layers(model: ModuleType) -> None:
    """Refuse layer pairs, groups and limits that are none."""

    def two(value, kind: type) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, kind) for one in value)

    wrong = [("PAIRS", pair, "(parent, child)") for pair in model.PAIRS if not two(pair, str)]
    counts = "(number of parent groups, of child groups)"
    wrong += [("GROUPS", n, counts) for n in model.GROUPS.values() if not two(n, Integral) or min(n) < 1]
    for child, limit in model.MAX_SPARSITY.items():
        if not isinstance(limit, Real) or not 0 <= limit <= 1:
            wrong.append(("MAX_SPARSITY", f"{child}: {limit}", "shares from 0 to 1"))
    inner = getattr(model, "INNER", None) or []
    wrong += [("INNER", key, "layers of MAX_SPARSITY, in a list") for key in inner if key not in model.MAX_SPARSITY]
    for where, what, legal in wrong[:1]:
        raise InputError(f"model.py: {where} holds {what}; legal: {legal}")
    if missing := [child for _, child in model.PAIRS if child not in model.GROUPS]:
        raise InputError(f"model.py: GROUPS lacks {', '.join(missing)}, of PAIRS")


def _defaults(model: ModuleType, stage: int) -> dict:
    """The values of model.py, by flag."""
    base = f"{model.NAME}/baseline"
    values = {"Model": model.NAME, "weights_dir": f"{base}/0", "Retrain": f"{base}/0/logits_best.pkl"}
    values |= {"Save_dir": {1: base, 3: f"{model.NAME}/pruned"}.get(stage), "Checkpoint": values["Retrain"]}
    values |= {"Samples_per_class": model.SCORING["samples_per_class"]}
    values |= model.RETRAINING if stage == 3 else model.TRAINING
    values |= {name.lower(): value for name, value in values.items()}  # as stage 2 spells them
    return values | model.SCORING if stage == 2 else values


def _check_values(where: str, values: dict) -> None:
    """Refuse values that no flag has, or not this one."""
    for name, value in values.items():
        if name not in FLAGS:
            raise InputError(f"{where} holds {name}, which is no flag; see --help")
        kind, choices = FLAGS[name].get("type"), FLAGS[name].get("choices")
        several, switch = "nargs" in FLAGS[name], "action" in FLAGS[name]
        if several != isinstance(value, (list, tuple)) or switch != isinstance(value, bool):
            legal = "a list" if several else "True or False" if switch else "a single value"
            raise InputError(f"{where}, {name}: {value!r}; legal: {legal}")
        for one in value if several else [value]:
            if choices is not None and one not in choices:
                raise InputError(f"{where}, {name}: {one!r} is none of {', '.join(choices)}")
            try:
                _ = kind and kind(str(one))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{where}, {name}: {error}") from error


def _options(name: str, flag: dict, defaults: dict) -> tuple[dict, object]:
    """What argparse is told of a flag, and its default."""
    default, kind = defaults.get(name, flag["default"]), flag.get("type", str)
    if isinstance(default, (list, tuple)):
        default = [kind(str(one)) for one in default]
    elif isinstance(default, Real) and not isinstance(default, bool):
        default = str(default)  # argparse makes a number of it, whatever kind of number it was
    options = {key: value for key, value in flag.items() if key not in ("stages", "default")}
    if name in ("Model", "model"):
        options["choices"] = (default,)
    if name == "key_id" and _stage == "2":
        options |= {"required": True, "type": lambda text: text if text == "all" else INDEX(text)}
    if name == "Epoch" and _stage == "3":
        options["type"] = INDEX  # none: the pruned network as it is
    if options.get("type") is results_path and default is not None:
        default = under_results(default)
    if default is not None and options.get("action") != "store_true":
        options["help"] += f" (default: {_shown(default)})"
    return options, default


def _shown(value) -> str:
    """A flag's value in words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Path):
        return display_path(value)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _check_training(args: Namespace, model: ModuleType) -> None:
    if args.Select == "val" and args.Val_size == 0:
        raise InputError("--Val_size 0 leaves nothing to choose the best epoch by; give a size, or --Select test")
    if args.Schedule != "one-cycle" and args.Warm_up != AS_EVER["Warm_up"]:
        raise InputError(f"--Warm_up belongs to --Schedule one-cycle, not to {args.Schedule}")
    if args.Dropout is not None:
        set_dropout(model.build(args.Dims), args.Dropout)
    if args.stage == 1 and args.Weights and args.Init:
        raise InputError("--Weights and --Init: the one trains nothing, the other starts a training; give one")
    if args.stage == 1 and args.Weights:
        args.Epoch = 0
    if args.Epoch and args.Batch_size < 2 * parallel.size():
        normed = _has_batch_norm(args, model)
        why, least = ("batch norm needs two images", 2) if normed else ("there is to be one image", 1)
        if args.Batch_size < (least := least * parallel.size()):
            raise InputError(f"--Batch_size {args.Batch_size}: {why} for each process; legal: {least} or more")


def _check_build(args: Namespace, model: ModuleType) -> None:
    """Refuse a network that is there already: no seed draws its first weights, and another run has trained them."""
    try:
        inspect.signature(model.build).bind(args.Dims)
    except TypeError as error:
        raise InputError(f"model.py: build: {reason(error)}; legal: a callable of the number of classes") from error
    network = model.build(args.Dims)
    if not isinstance(network, nn.Module) or network is model.build(args.Dims):
        what = f"{'the same' if isinstance(network, nn.Module) else 'a'} {type(network).__name__}"
        raise InputError(f"model.py: build returns {what}; legal: a new network every time")


def _has_batch_norm(args: Namespace, model: ModuleType) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.build(args.Dims).modules())


def _check_scoring(args: Namespace, model: ModuleType) -> None:
    args.key_ids = range(len(model.PAIRS)) if args.key_id == "all" else [in_range(args.key_id, model.PAIRS)]
    resolve_groups(args, [model.PAIRS[k][1] for k in args.key_ids], model)
    if args.given == model.SCORING.get("given") and args.estimator != model.SCORING.get("estimator", "kde"):
        args.given = None  # the default belongs to the default estimator
    if args.sampling == "means":
        args.positions = None
    elif not any(isinstance(layer, nn.modules.conv._ConvNd) for layer in model.build(args.dims).modules()):
        raise InputError(f"--sampling positions: {model.NAME} has no convolution; legal: means")
    scoring_options(args)


def _check_pruning(args: Namespace, model: ModuleType) -> None:
    _check_training(args, model)
    pruned_share(args)
    resolve_pairs(args, model)
    if real(args.Save_dir) in map(real, (*args.Retrain.parents[:2], *real(args.Retrain).parents[:2])):
        where = display_path(args.Save_dir)
        raise InputError(f"--Save_dir {where} holds the checkpoint that is pruned; name another directory")
    if not (args.Refit or args.Criterion == "taylor" or _has_batch_norm(args, model)):
        args.Samples_per_class = None  # no images are needed: not recorded


def _check_exporting(args: Namespace, _model: ModuleType) -> None:
    if absent := [name for name in export.PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"stage 4 needs {', '.join(absent)}: pip install -r requirements-export.txt")
    args.Save_dir = args.Save_dir or args.Checkpoint.parent / "export"
    if real(args.Save_dir) in (real(args.Checkpoint.parent), real(args.Checkpoint).parent):
        raise InputError(f"--Save_dir {display_path(args.Save_dir)} holds the checkpoint; name another directory")


def recorded(args: Namespace) -> dict:
    """The arguments as records hold them: what decides the result, no path outside the repository."""
    return {
        flag: display_path(value) if isinstance(value, Path) else value
        for flag, value in sorted(vars(args).items())
        if flag not in UNRECORDED and (flag not in AS_EVER or value != AS_EVER[flag])
    }


def load_data(args: Namespace, checkpoint: dict | None = None) -> Data:
    """The data set, split as the flags ask for, on the chosen device; settles --Amp and --Compile, which depend on it.

    Refuses a wrong number of classes, and a checkpoint of other data or of images that are now held out.
    """
    given = {flag.lower(): value for flag, value in vars(args).items()}  # stage 2 spells the same flags in lower case
    on = choose_device(given["device_ids"])
    if args.stage == 2:
        val_size = (checkpoint or {}).get("val_size", 0)
        if not (isinstance(val_size, int) and val_size >= 0):
            raise InputError(f"{weights_path(args)}: its val_size is {val_size!r}; legal: a whole number from 0")
    else:
        val_size = args.Val_size if args.Select == "val" else 0
        args.Amp = on.type == "cuda" and torch.cuda.is_bf16_supported() if args.Amp is None else args.Amp
    reading = {"workers": min(args.cores, CORES) if args.stage == 2 else args.Workers, "skip": given["skip_unreadable"]}
    options = {"val_size": val_size, "device": on, "classes": given["classes"]}
    data = load(given["dataset"], given["data_dir"], **options, **reading)
    if args.stage != 2 and isinstance(data.train, FileSplit):  # threads that pin memory spoil the capture of a graph
        args.Compile = bool(args.Compile)
    if given["dims"] != data.classes:
        raise InputError(f"`dims` {given['dims']}: {data.name} has {data.classes} classes")
    for name, now in trained_on(data).items():
        before = (checkpoint or {}).get(name, now)
        if before != now:
            use = "the same" if name != "val_size" else f"the same, with `select` {'val' if before else 'last'}"
            now, before = ("all" if value is None else _shown(value) for value in (now, before))  # None: all classes
            raise InputError(f"`{name}` {now}: the checkpoint was trained with {before}; use {use}")
    chooses = {"val": data.val, "last": None, "test": data.test}
    return replace(data, selection=chooses[args.Select]) if args.stage != 2 else data


def load_given(args: Namespace, network: nn.Module, model: ModuleType) -> None:
    """Put the weights into the network that --Weights or --Init names, if one does: torchvision's, or a file's."""
    source = args.Weights or args.Init
    if source is None:
        return
    if source != "torchvision":
        checkpoint = artifacts.load_weights(network, source, foreign=True)
        if Mask.of_checkpoint(checkpoint, network).percent_pruned():
            raise InputError(f"{source} is of a pruned network, whose mask stage 1 drops; stage 3 keeps it: --Retrain")
        return
    flag, name = "Weights" if args.Weights else "Init", getattr(model, "PRETRAINED", None)
    if name is None:
        raise InputError(f"--{flag} torchvision: torchvision has no weights of {model.NAME}; name a file")
    try:
        state = torchvision().models.get_weight(name).get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--{flag} torchvision: no download ({reason(error)}); name a file") from error
    artifacts.load_state_dict(network, state, name)


def start_run(
    args: Namespace, rerun: int, name: str, images: Data, known: dict | None = None, mask: Mask | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A run of stages 1 and 3 that writes the checkpoint `name`, with what else is `known` of it; see `runs.Run`."""
    given = [source for flag in ("Weights", "Init") if isinstance(source := getattr(args, flag, None), Path)]
    record = {"stage": args.stage, "arguments": recorded(args), "inputs": records.checksums(*given)}
    record |= {"data": images.describe(), **args.code, **(known or {})}
    if mask is not None:
        parallel.assert_in_sync(mask)
    coarse = "" if mask is None else " (coarse groups give several shares one file)"
    options = {"seed": args.Seed + rerun, "select": args.Select, "resume": args.Resume, "mask": mask}
    options["remedy"] = f"name another --Save_dir, or remove {name.removesuffix('.pkl')}.*{coarse}"
    return runs.start(args.Save_dir / str(rerun) / name, record, images, **options)


def example_images(args: Namespace) -> Tensor:
    """Random training images on the CPU that stage 4 traces, checks and measures a network with."""
    reading = {"classes": args.Classes, "workers": args.Workers, "skip": args.Skip_unreadable}
    split = load(args.Dataset, args.Data_dir, val_size=0, device=torch.device("cpu"), **reading).train
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: max(export.BATCHES)]
    return next(iter(split[rows].batches(len(rows))))[0]


@contextlib.contextmanager
def start_export(args: Namespace) -> Iterator[Callable[[dict[str, bytes], dict], None] | None]:
    """What writes stage 4's files, by suffix, and their record, alone with them; None if they are there already."""
    path = (args.Save_dir / args.Checkpoint.name).with_suffix(".safetensors")
    record = {"stage": 4, "arguments": recorded(args), "inputs": records.checksums(args.Checkpoint), **args.code}
    _note_other_code(args, args.Checkpoint)

    def write(contents: dict[str, bytes], measured: dict) -> None:
        known = {**record, **records.environment(torch.device("cpu")), "status": "complete", **measured}
        known["packages"] |= {package: version(package) for package in export.PACKAGES}
        records.save({path.with_suffix(suffix): content for suffix, content in contents.items()}, known)
        print(export.table(known))
        print(f"{path.with_suffix('')}: {', '.join(contents)} and the record are written")

    with file_lock(path):
        done = records.is_complete(path, record, "name another --Save_dir, or remove these files", export.table)
        yield None if done else write


def about(args: Namespace) -> dict[str, str]:
    """What exported weights say of themselves: the architecture and the record of the run that made them."""
    record = {k: v for k, v in records.of(args.Checkpoint).items() if k != "epochs"}
    return {"format": "pt", "architecture": args.Model, "record": json.dumps(record)}


def _note_other_code(args: Namespace, checkpoint: Path) -> None:
    """Say if code that both share, such as model.py, is not what it was when the checkpoint was made."""
    made, now = records.of(checkpoint).get("code", {}), args.code["code"]
    other = ", ".join(sorted(file for file in made.keys() & now.keys() if made[file] != now[file]))
    if other and parallel.rank() == 0:
        print(f"{checkpoint} was made with other code in {other}; its weights are taken as they are")


def weights_path(args: Namespace) -> Path:
    """The checkpoint that stage 2 scores."""
    return args.weights_dir / (args.weights_file or "logits_best.pkl")


@contextlib.contextmanager
def pending_pairs(args: Namespace, network: nn.Module, model: ModuleType, images: Data) -> Iterator[list[LayerPair]]:
    """The layer pairs that stage 2 is asked for and that are not scored yet, alone with their files."""
    known = {"inputs": records.checksums(weights_path(args)), "data": images.describe(), **args.code}
    known |= records.environment(images.device)
    _note_other_code(args, weights_path(args))
    families, todo = artifacts.score_paths(args.weights_dir, args.name_postfix), []
    last = None if args.granularity == "channel" else output_layer(network, images.train)
    with contextlib.ExitStack() as locks:
        for key_id, *groups in zip(args.key_ids, args.parent_clusters, args.children_clusters, strict=True):
            parent, child = model.PAIRS[key_id]
            blocks = contiguous_blocks(network, child, *groups, last)
            paths = tuple(artifacts.score_path(family, parent, child) for family in families)
            of_pair = {"key_id": key_id, "parent_clusters": groups[:1], "children_clusters": groups[1:]}
            arguments = recorded(Namespace(**{**vars(args), **of_pair}))
            record = {"stage": 2, "arguments": arguments, **known}
            locks.enter_context(file_lock(paths[0]))
            if not records.is_complete(paths[0], record, f"name another --name_postfix, or remove {paths[0].stem}.*"):
                todo.append(LayerPair(child, blocks, paths, record))
        yield todo
        if len(args.key_ids) > 1:
            print(f"{args.weights_dir}: scores of {len(args.key_ids)} layer pairs are complete")


def scoring_options(args: Namespace, **more) -> dict:
    """The options of `layer_cmi` that the flags ask for, and more that are not None."""
    owner = {"width": "kde", "precision": "kde", "device": "kde", "given": "gaussian"}
    given = {flag: getattr(args, flag) for flag in owner if getattr(args, flag) is not None}
    for flag in given:
        if args.estimator != owner[flag]:
            raise InputError(f"--{flag} belongs to --estimator {owner[flag]}, not to {args.estimator}")
    if args.device == "cuda":
        if args.scheduler:
            raise InputError("--scheduler: its workers compute on CPUs; leave out --device cuda")
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this machine has no CUDA GPU")
        given["device"] = f"cuda:{args.device_ids}"
    default = {"precision": "single"} if args.estimator == "kde" else {}
    jobs = cluster.connect(args.scheduler) if args.scheduler else args.cores
    options = {"estimator": args.estimator, "n_jobs": jobs, "seed": args.seed}
    return {**default, **options, **given, **{name: value for name, value in more.items() if value is not None}}


class Plan(NamedTuple):
    """What stage 3 is asked to prune; blocks and scores (H, G) by child layer."""

    blocks: dict[str, Blocks]
    scores: dict[str, np.ndarray] | None
    like: dict[str, np.ndarray] | None  # scores whose share of every layer a control takes over
    sparsity: float  # of the masked layers together
    max_sparsity: list[float]  # of each
    within: Mask  # of the checkpoint, if it is of a pruned network: what is gone stays gone
    known: dict  # entries of the record


def pruning_plan(args: Namespace, network: nn.Module, model: ModuleType, images: Data, checkpoint: dict) -> Plan:
    """Blocks, scores and share that the flags ask for; without scores, blocks by the flags."""
    last = None if args.Granularity == "channel" else output_layer(network, images.train)
    within = Mask.of_checkpoint(checkpoint, network)
    run_order(network, args.children_key, images.train)  # refuses what cannot be pruned
    _note_other_code(args, args.Retrain)
    families, made_of = score_families(args), records.checksums(args.Retrain)
    blocks, scores, paths, made = {}, {} if families else None, [], {}
    asked = zip(args.parent_key, args.children_key, args.parent_clusters, args.children_clusters, strict=True)
    for parent, child, *groups in asked:
        blocks[child] = contiguous_blocks(network, child, *groups, last)
        if families:
            remedy = f"run pruning_1b.py --key_id {model.PAIRS.index((parent, child))} with the same groups first"
            paths += [artifacts.score_path(family, parent, child) for family in families]
            scores[child], blocks[child], made = scoring.load(paths[-3:], blocks[child], remedy, made_of)
    sparsity, whole, positions = pruned_share(args), weight_count(network), {}
    if args.Prune_of == "macs":
        positions = output_positions(network, images.train)
        whole = sum(network.get_parameter(key).numel() * count for key, count in positions.items())
        blocks = {key: replace(block, positions=positions[key]) for key, block in blocks.items()}
    if args.Prune_of_network:
        masked = sum(block.cost.sum() for block in blocks.values())
        others = {key: kept for key, kept in within.items() if key not in blocks}  # pruned in an earlier round
        gone = sum(int((~kept).sum()) * positions.get(key, 1) for key, kept in others.items())
        if not gone <= sparsity * whole <= gone + masked:
            held = f"hold {100 * masked / whole:.2f} %, gone from others are {100 * gone / whole:.2f} %"
            raise InputError(f"{100 * sparsity:g} % of the network: the masked layers {held}")
        sparsity = float((sparsity * whole - gone) / masked)
    known = {"inputs": records.checksums(args.Retrain, *paths), "requested_percent": 100 * sparsity}
    if made:
        how = ("estimator", "given", "sampling", "positions", "grouping", "samples_per_class")
        known["scores"] = {flag: made["arguments"][flag] for flag in how if made["arguments"].get(flag)}
    like = scores if families and not args.Criterion.startswith("cmi") else None
    torch.manual_seed(args.Seed)  # for a rule of one's own that draws; after a run `runs.start` does so
    return Plan(blocks, scores, like, sparsity, args.upper_prune_limit, within, known)


def calibration_images(args: Namespace, images: Data) -> Split | FileSplit | None:
    """The training images that stage 3 takes statistics from, if what it is asked for needs any."""
    if args.Samples_per_class is None:
        return None
    count, labels = args.Samples_per_class, images.train.labels
    if not args.Refit and args.Criterion != "taylor":  # nothing but a figure depends on them: as many as there are
        count = min(count, int(labels.unique(return_counts=True)[1].min()))
    return images.train[sample_per_class(labels, count, args.Seed)]


def score_families(args: Namespace) -> list[Path]:
    """The families of score and label files that stage 3 reads; none for the controls unless they are named."""
    if args.Retrain_mask is None and not args.Criterion.startswith("cmi"):
        return []
    mask = args.Retrain_mask or args.Retrain.with_name("I_parent_cmi.npy")
    mask, *labels = (_family(args, path) for path in (mask, args.Labels_file, args.Labels_children_file))
    named = re.fullmatch(r"I_parent_(.*)\.npy", mask.name)
    if named is None:
        raise InputError(f"--Retrain_mask {mask.name}: must be I_parent_<postfix>.npy, as stage 2 names scores")
    beside = artifacts.score_paths(mask.parent, named[1])
    return [mask, labels[0] or beside[1], labels[1] or beside[2]]


def _family(args: Namespace, path: Path | None) -> Path | None:
    """The family of a path that may name the file of one layer pair."""
    for parent, child in zip(args.parent_key, args.children_key, strict=True):
        path = path and path.with_name(path.name.replace(f"_{parent}_{child}.npy", ".npy"))
    return path


def pruned_share(args: Namespace) -> float:
    """The pruned share that `--Prune_per`, or `--key_id` on the grid, asks for."""
    if (args.Prune_per is None) == (args.key_id is None):
        raise InputError("give either --key_id, to choose from the grid of pruned shares, or --Prune_per")
    if args.Prune_per is not None:
        return args.Prune_per
    if None in (args.lower_prune_per, args.upper_prune_per, args.prune_per_step):
        raise InputError("--key_id: model.py's RETRAINING has no grid of pruned shares; give --Prune_per")
    if args.lower_prune_per > args.upper_prune_per:
        raise InputError(f"--lower_prune_per {args.lower_prune_per} is above --upper_prune_per {args.upper_prune_per}")
    steps = int((args.upper_prune_per - args.lower_prune_per) / args.prune_per_step + 1e-9)
    grid = [round(args.lower_prune_per + k * args.prune_per_step, 9) for k in range(steps + 1)]
    return grid[in_range(args.key_id, grid)]


def resolve_pairs(args: Namespace, model: ModuleType) -> None:
    """Put the layer pairs that stage 3 prunes, their numbers of groups and their limits into the arguments."""
    masked = getattr(model, "INNER", []) or model.MAX_SPARSITY if args.Granularity == "channel" else model.MAX_SPARSITY
    args.children_key = args.children_key or [key for key in model.MAX_SPARSITY if key in masked]
    parents = {child: parent for parent, child in model.PAIRS}
    args.parent_key = args.parent_key or [parents.get(child, "?") for child in args.children_key]
    if len(args.parent_key) != len(args.children_key):
        counts = f"--parent_key has {len(args.parent_key)} values, --children_key {len(args.children_key)}"
        raise InputError(f"{counts}: give pairs")
    for pair in zip(args.parent_key, args.children_key, strict=True):
        if pair not in model.PAIRS:
            pairs = _list(model.PAIRS)
            raise InputError(f"--parent_key {pair[0]} --children_key {pair[1]} is no layer pair; legal: {pairs}")
    if len(set(args.children_key)) < len(args.children_key):
        raise InputError("--children_key names a layer twice")
    resolve_groups(args, args.children_key, model)
    limits = [float(model.MAX_SPARSITY.get(child, 1)) for child in args.children_key]
    one_per_pair(args, "upper_prune_limit", limits)


def resolve_groups(args: Namespace, children: list[str], model: ModuleType) -> None:
    """Put numbers of groups, one per child layer, into the arguments."""
    given, groups = {flag.lower(): value for flag, value in vars(args).items()}, model.GROUPS
    if given["granularity"] == "channel":
        network = model.build(given["dims"])
        groups = {child: (network.get_parameter(child).shape[1], 1) for child in children}
        if set(args.children_clusters or [1]) != {1}:
            raise InputError("`granularity` channel has one group of children: leave `children_clusters` out")
    for k, flag in enumerate(("parent_clusters", "children_clusters")):
        one_per_pair(args, flag, [int(groups[child][k]) for child in children])


def in_range(index: int, choices: list) -> int:
    """What --key_id counts, if it is there."""
    if index >= len(choices):
        raise InputError(f"--key_id {index} is out of range; legal: {_list(choices)}")
    return index


def one_per_pair(args: Namespace, flag: str, default: list) -> None:
    """Put one value per layer pair into the arguments, as many as by default; a single value stands for all."""
    values, pairs = getattr(args, flag) or default, len(default)
    if len(values) not in (1, pairs):
        raise InputError(f"--{flag} has {len(values)} values for {pairs} layer pairs; give 1 or {pairs}")
    setattr(args, flag, values * pairs if len(values) == 1 else values)


def choose_device(index: int) -> torch.device:
    """The chosen CUDA GPU, or the CPU where there is none."""
    count, index = torch.cuda.device_count(), parallel.local_gpu(index)
    if count == 0:
        if parallel.rank() == 0:
            print(f"No CUDA GPU: running on the CPU ({torch.get_num_threads()} threads).")
        return torch.device("cpu")
    if index >= count:
        raise InputError(f"--Device_ids {index}: this machine has GPUs 0 to {count - 1}")
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True  # shapes stay the same; GPU runs are not bit for bit repeatable anyway
    return torch.device("cuda", index)


def run(main: Callable[[], None]) -> None:
    """Run a script: one line and exit code 2 for unusable input or means, 1 for diverged training, 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the script
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, open as long as the process
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
    try:
        with parallel.processes():
            main()
        sys.stdout.flush()
    except (InputError, Diverged) as error:
        sys.exit(_say(error, 1 if isinstance(error, Diverged) else 2))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_say(f"{where}{error.strerror or reason(error)}; {GO_ON}", 2))
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(_say(f"--Compile: torch.compile fails here ({reason(error)}); leave it out", 2))
        if parallel.size() > 1 and "by peer" in str(error):
            sys.exit(_say(f"another process ended early; it says why, or its host is gone; {GO_ON}", 2))
        if not out_of_memory(error):
            raise
        less = "fewer `cores`, fewer `samples_per_class`" if _stage == "2" else "a smaller `batch_size`"
        sys.exit(_say(f"not enough memory ({reason(error)}); {less}; {GO_ON}", 2))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one changes nothing
        _say(f"interrupted; {GO_ON}", 130)
        with contextlib.suppress(OSError):  # a `tee` that is interrupted too
            sys.stdout.flush()
        os._exit(130)  # at once: workers that are still at it would abort Python's own way out
    finally:  # what is left is Python's own way out, in which an interrupt, or a pipe that ended, prints a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list(choices: list) -> str:
    """Choices with their indices, in words."""
    return ", ".join(f"{i}: {_shown(c)}" for i, c in enumerate(choices))


def _say(error, code: int) -> int:
    if parallel.is_first(str(error)):
        print(f"{Path(sys.argv[0]).name}: error: {in_flags(str(error))}", file=sys.stderr)
    return code


def in_flags(message: str) -> str:
    """A message that names `parameters`, by the names of the running stage's flags."""
    flags = {name.lower(): f"--{name}" for name, flag in FLAGS.items() if _stage in flag["stages"]}
    flags |= {f"no-{name}": flag.replace("--", "--no-") for name, flag in flags.items()}
    return re.sub(r"`([\w-]+)`", lambda name: flags.get(name[1].lower(), name[1]), message)
