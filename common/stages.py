"""The three stages. A network's folder calls them with its module `model`, which holds all that differs:

NAME                  of the folder, and of the default directories below results/
build(classes)        the network; classes is the number of its outputs
PAIRS                 (parent, child) layers by their names in the state_dict; key_id k of stage 2 is PAIRS[k]
TRAINING, RETRAINING  default flags of stages 1 and 3
SAMPLES_PER_CLASS     training images of each class that stage 2 scores with
GROUPS                {child: (parent groups, child groups)}
LIMITS                {child: largest share of it that is pruned} of the layers that stage 3 prunes
PRETRAINED            optional: name of torchvision's weights
"""

import argparse
import contextlib
import copy
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import torch
from torch import nn

from common import activations, artifacts, cli, masks, parallel, refit, runs, scoring
from common.data import Data, load, sample_per_class
from common.datasets import torchvision
from common.errors import InputError, reason
from common.training import evaluate


@cli.script
def train(doc: str, model: ModuleType) -> None:
    """Stage 1: train the dense network, or take given weights, and write logits_best.pkl."""
    args = cli.parse(doc, stage=1, **model.TRAINING, Model=model.NAME, Save_dir=f"{model.NAME}/baseline")
    cli.set_dropout(args, model.build(args.Dims))  # refuses before the data are read
    device = cli.training_device(args)
    data = cli.load_data(args, device)
    cli.check_data(args, data)
    given = [args.Weights] if isinstance(args.Weights, Path) else []
    for rerun in range(args.Expt_rerun):
        best = args.Save_dir / str(rerun) / "logits_best.pkl"
        record = {"stage": 1, "arguments": cli.recorded(args), "inputs": artifacts.checksums(*given)}
        with artifacts.alone(best):
            if not artifacts.is_complete(best, record):
                _train(args, model, device, data, best, args.Seed + rerun, record)


@cli.script
def score(doc: str, model: ModuleType) -> None:
    """Stage 2: score one layer pair, or all of them after one pass over the images."""
    args = cli.parse(
        doc,
        stage=2,
        model=model.NAME,
        dataset=model.TRAINING["Dataset"],
        dims=model.TRAINING["Dims"],
        weights_dir=f"{model.NAME}/baseline/0",
        samples_per_class=model.SAMPLES_PER_CLASS,
    )
    every = range(len(model.PAIRS))
    key_ids = every if args.key_id == "all" else [cli.in_range("key_id", args.key_id, model.PAIRS)]
    pairs = [model.PAIRS[key_id] for key_id in key_ids]
    cli.resolve_groups(args, [child for _, child in pairs], model.GROUPS)
    options = cli.scoring_options(args)
    device = cli.device(args.device_ids)
    network, weights = model.build(args.dims), args.weights_dir / (args.weights_file or "logits_best.pkl")
    checkpoint = artifacts.load_weights(network, weights)
    inputs = artifacts.checksums(weights)
    with contextlib.ExitStack() as locks:
        todo = []
        for key_id, (parent, child), *groups in zip(
            key_ids, pairs, args.parent_clusters, args.children_clusters, strict=True
        ):
            blocks = masks.contiguous_blocks(network, child, *groups)
            families = artifacts.score_families(args.weights_dir, args.name_postfix)
            files = [artifacts.of_pair(family, parent, child) for family in families]
            of_pair = {"key_id": key_id, "parent_clusters": groups[:1], "children_clusters": groups[1:]}
            arguments = cli.recorded(argparse.Namespace(**{**vars(args), **of_pair}))
            record = {"stage": 2, "arguments": arguments, "inputs": inputs}
            locks.enter_context(artifacts.alone(files[0]))
            if not artifacts.is_complete(files[0], record):
                todo.append((child, blocks, files, record))
        if todo:
            _score(args, options, network, checkpoint, device, todo)


@cli.script
def retrain(doc: str, model: ModuleType) -> None:
    """Stage 3: prune by the scores, or by a control, and retrain what is left."""
    args = cli.parse(
        doc,
        stage=3,
        **model.RETRAINING,
        Model=model.NAME,
        Retrain=f"{model.NAME}/baseline/0/logits_best.pkl",
        Save_dir=f"{model.NAME}/pruned",
        Samples_per_class=model.SAMPLES_PER_CLASS,
    )
    if not args.Refit:
        args.Samples_per_class = None  # no images are needed: not recorded
    share = cli.pruned_share(args)
    cli.resolve_pairs(args, model.PAIRS, model.GROUPS, model.LIMITS)
    cli.check_save_dir(args)
    device = cli.training_device(args)
    network = model.build(args.Dims)
    cli.set_dropout(args, network)
    checkpoint = artifacts.load_weights(network, args.Retrain)
    blocks, scores, score_files = cli.blocks_and_scores(args, network, model.PAIRS)
    share = cli.share_of_masked(args, share, network, blocks)
    data = cli.load_data(args, device)
    cli.check_data(args, data, checkpoint)
    inputs = artifacts.checksums(args.Retrain, *score_files)
    network = _placed(network, device)
    sample = None
    if args.Samples_per_class:
        rows = sample_per_class(data.train.labels, args.Samples_per_class, args.Seed, "Samples_per_class")
        sample = data.train[rows]
    record = {"stage": 3, "arguments": cli.recorded(args), "inputs": inputs, "requested_percent": 100 * share}
    for rerun in range(args.Expt_rerun):
        seed = args.Seed + rerun
        network.load_state_dict(checkpoint["state_dict"])
        limits = args.upper_prune_limit
        pruned = masks.choose(args.Criterion, network, blocks, share, limits, scores=scores, even=args.Even, seed=seed)
        held = masks.build(pruned, blocks, network)
        parallel.check_same(held)
        dense = copy.deepcopy(network) if args.Refit else None
        masks.holder(network, held)()
        percent = masks.percent_zero([network.get_parameter(key) for key in held])
        best = args.Save_dir / str(rerun) / f"logits_{percent:.2f}.pkl"
        with artifacts.alone(best):
            if artifacts.is_complete(best, record):
                continue
            if args.Refit:
                refit.refit(network, dense, held, sample)
            runs.show(_run(args, network, data, best, seed, record, held=held))


def _run(args: argparse.Namespace, network: nn.Module, data: Data, best: Path, seed: int, record: dict, **more) -> dict:
    """One training run as the flags of stages 1 and 3 ask for it."""
    recipe = cli.recipe(args)
    return runs.train(
        network, data, recipe, best, seed=seed, select=args.Select, record=record, resume=args.Resume, **more
    )


def _train(
    args: argparse.Namespace, model: ModuleType, device: torch.device, data: Data, best: Path, seed: int, record: dict
) -> None:
    """One dense network: trained, or with given weights."""
    torch.manual_seed(seed)
    network = model.build(args.Dims)
    cli.set_dropout(args, network)
    if args.Weights:
        _take_weights(network, model, args.Weights)
        _evaluate_only(_placed(network, device), data, best, record)
        return
    if parallel.rank() == 0:
        print(f"{best.parent}: seed {seed}")
    _run(args, _placed(network, device), data, best, seed, record, final=best.with_name("logits_final.pkl"))


def _score(
    args: argparse.Namespace, options: dict, network: nn.Module, checkpoint: dict, device: torch.device, todo: list
) -> None:
    """The scores of layer pairs, each given as (child, blocks, files, record), after one pass over the images."""
    val_size, classes = checkpoint.get("val_size", 0), args.classes
    reading = {"device": device, "workers": args.cores, "skip": args.skip_unreadable}
    data = load(args.dataset, args.data_dir, val_size=val_size, classes=classes, **reading)
    cli.check_data(args, data, checkpoint)
    sample = data.train[sample_per_class(data.train.labels, args.samples_per_class, args.seed)]
    keys = [child for child, *_ in todo]
    seen = activations.paired(_placed(network, device), keys, sample)
    relevance = activations.relevance(network, keys, sample) if args.given == "kept" else {}
    known = {"data": data.describe(), **artifacts.circumstances(device)}
    for child, blocks, files, record in todo:
        parents, children = seen.pop(child)
        if args.grouping == "correlation":
            blocks = masks.correlated_blocks(blocks, children.numpy(), parents.numpy())
        snr = {"snr": relevance[child]} if relevance else {}
        scoring.score(children, parents, blocks, files, {**record, **known}, **options, **snr)


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, convolutions in the memory layout that is fastest on CPUs and GPUs alike."""
    return parallel.prepare(network.to(device, memory_format=torch.channels_last))


def _take_weights(network: nn.Module, model: ModuleType, source: Path | str) -> None:
    """Load torchvision's weights ("torchvision"), or those of a file: a checkpoint or a plain state_dict."""
    if source != "torchvision":
        artifacts.load_state_dict(network, artifacts.load_checkpoint(source, plain=True)["state_dict"], source)
        return
    name = getattr(model, "PRETRAINED", None)
    if name is None:
        raise InputError(f"--Weights torchvision: torchvision has no weights of {model.NAME}; name a file")
    try:
        state = torchvision().models.get_weight(name).get_state_dict(check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(f"--Weights torchvision: no download ({reason(error)}); name a file") from error
    artifacts.load_state_dict(network, state, name)


def _evaluate_only(network: nn.Module, data: Data, best: Path, record: dict) -> None:
    """Write given weights as if they had just been trained, with the accuracy on the test set."""
    state = {"state_dict": network.state_dict(), "epoch": 0, **runs.trained_on(data)}
    test = asdict(evaluate(network, data.test))
    known = {"best": {"epoch": 0}, "test": test, "data": data.describe()}
    known |= artifacts.circumstances(data.train.labels.device)
    artifacts.save({best: artifacts.checkpoint_bytes(state)}, {**record, **known, "status": "complete"})
    if parallel.rank() == 0:
        print(f"{best}: test accuracy {test['accuracy']:.2f} % (top-5 {test['top5']:.2f} %)")
