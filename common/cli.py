"""The flags of all scripts, each declared once. A script names those it takes and their defaults."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import artifacts, parallel, scoring
from common.artifacts import ROOT, public, under_results
from common.cmi import ESTIMATORS, kde
from common.cmi.inputs import out_of_memory
from common.data import Data, load
from common.datasets import DATASETS
from common.errors import Diverged, InputError, reason
from common.masks import Blocks, contiguous_blocks
from common.runs import trained_on
from common.training import OPTIMIZERS, Recipe


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` (or above it) to `high`."""

    def parse(text: str):
        legal = f"{'above' if above else 'at least'} {low:g}" + (
            f" and at most {high:g}" if high != float("inf") else ""
        )
        name = {int: "a whole number", float: "a number"}[kind]
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {legal}") from None
        if not (low < value or (value == low and not above)) or not value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {name} {legal}")
        return value

    return parse


def results_path(text: str) -> Path:
    """An argparse type: a path, under `results/` if it is relative."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return under_results(text)


def folder(text: str) -> Path:
    """An argparse type: a path, from where the script is run."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def plain_name(text: str) -> str:
    """An argparse type: a part of a file name."""
    if not text or not all(c.isalnum() or c in "._-" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} may hold letters, digits, '.', '_' and '-' only")
    return text


def key_id_or_all(text: str) -> int | str:
    """An argparse type: an index from 0, or "all"."""
    return text if text == "all" else INDEX(text)


def weights_source(text: str) -> Path | str:
    """An argparse type: a path as `results_path`, or "torchvision"."""
    return text if text == "torchvision" else results_path(text)


COUNT, SHARE, INDEX = number(int, 1), number(float, 0, 1), number(int, 0)
POSITIVE = number(float, 0, above=True)
MANY, GPU = {"nargs": "+"}, "number of the CUDA GPU to use, if there is any; under torchrun each process has its own"
BY_LAYER = "one for all pairs, or one per pair (default: model.py's, by layer)"
CLASSES = "names of the classes to use the images of; labels and outputs stay those of the whole data set (all)"
SKIP = "leave out image files that cannot be read, naming them"
DROPOUT = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d
SWITCH = argparse.BooleanOptionalAction
GO_ON = "the same command goes on from what is written"
DATA_DIR = {"type": folder, "default": ROOT / "data", "help": "where data sets lie, and are downloaded to if absent"}


def _flag(stages: str, kind, help_: str, default=None, **options) -> dict:
    typed = {"choices": kind} if isinstance(kind, (tuple, dict)) else {"type": kind}
    return {"stages": stages, **({} if kind is None else typed), "help": help_, "default": default, **options}


FLAGS = {
    "Epoch": _flag("13", COUNT, "epochs"),
    "Batch_size": _flag("13", COUNT, "images per step"),
    "Lr": _flag("13", POSITIVE, "learning rate"),
    "Save_dir": _flag("13", results_path, "the runs go to SAVE_DIR/0, SAVE_DIR/1, ..."),
    "Dataset": _flag("13", DATASETS, "data set"),
    "Dims": _flag("13", COUNT, "number of classes"),
    "Expt_rerun": _flag("13", COUNT, "number of runs, with seeds SEED, SEED + 1, ...", 1),
    "Milestones": _flag("13", COUNT, "epochs after which the learning rate is multiplied by GAMMA", nargs="*"),
    "Opt": _flag("13", OPTIMIZERS, "optimizer; sgd has momentum 0.9"),
    "Weight_decay": _flag("13", number(float, 0), "weight decay"),
    "Dropout": _flag("13", number(float, 0, 0.99), "rate of all dropout layers (default: model.py's)"),
    "Model": _flag("13", None, "the network of this folder"),
    "Gamma": _flag("13", POSITIVE, "factor of the learning rate at the milestones"),
    "Nesterov": _flag("13", None, "Nesterov momentum", action=SWITCH),
    "Device_ids": _flag("13", INDEX, GPU, 0),
    "Data_dir": {"stages": "13", **DATA_DIR},
    "Seed": _flag("13", INDEX, "seed of the first run", 0),
    "Classes": _flag("13", None, CLASSES, **MANY),
    "Workers": _flag("13", INDEX, "processes that read images which do not fit into memory", min(8, os.cpu_count())),
    "Amp": _flag("13", None, "train in bfloat16 where safe (on GPUs that have it)", action=SWITCH),
    "Compile": _flag(
        "13", None, "train through torch.compile: slow to start, then faster on GPUs", action="store_true"
    ),
    "Resume": _flag("13", None, "go on where a killed run was (on)", True, action=SWITCH),
    "Skip_unreadable": _flag("13", None, SKIP, action="store_true"),
    "Weights": _flag(
        "1", weights_source, "do not train: evaluate and write the weights of this file, or 'torchvision'"
    ),
    "Val_size": _flag("13", INDEX, "training images held out to choose the best epoch by"),
    "Select": _flag("13", ("val", "last", "test"), "epoch kept: best on held-out images, last, best on test", "val"),
    "Retrain": _flag("3", results_path, "the checkpoint to prune"),
    "Retrain_mask": _flag(
        "3", results_path, "DIR/I_parent_<postfix>.npy, for the scores of all pairs (cmi: beside RETRAIN)"
    ),
    "Labels_file": _flag("3", results_path, "DIR/Labels_<postfix>.npy (default: beside the scores)"),
    "Labels_children_file": _flag("3", results_path, "DIR/Labels_children_<postfix>.npy (default: beside the scores)"),
    "parent_key": _flag("3", None, "the parent layer of each pair (default: the children's)", **MANY),
    "children_key": _flag(
        "3", None, "the child layer of each pair, whose weights are pruned (default: the LIMITS of model.py)", **MANY
    ),
    "upper_prune_limit": _flag("3", SHARE, f"largest pruned share of a layer: {BY_LAYER}", **MANY),
    "upper_prune_per": _flag("3", SHARE, "end of the grid of pruned shares"),
    "lower_prune_per": _flag("3", SHARE, "start of the grid of pruned shares"),
    "prune_per_step": _flag("3", number(float, 0, 1, above=True), "step of the grid of pruned shares"),
    "Prune_per": _flag("3", SHARE, "the pruned share itself, instead of the grid and KEY_ID"),
    "Prune_of_network": _flag(
        "3", None, "pruned shares are of all weights, not of the masked layers'", action="store_true"
    ),
    "Criterion": _flag(
        "3", ("cmi", "cmi-magnitude", "random", "magnitude"), "what ranks the blocks; see the README", "cmi"
    ),
    "Refit": _flag("3", None, "refit the kept weights by least squares before retraining", action=SWITCH),
    "Samples_per_class": _flag("3", COUNT, "training images of each class to refit with"),
    "Even": _flag("3", None, "spread the kept blocks evenly over child and parent groups", action=SWITCH),
    "model": _flag("2", None, "the network of this folder"),
    "dataset": _flag("2", DATASETS, "data set"),
    "weights_dir": _flag("2", results_path, "where the checkpoint lies and the scores go"),
    "weights_file": _flag("2", plain_name, "name of the checkpoint (default: logits_best.pkl)"),
    "cores": _flag("2", COUNT, "parallel workers", os.cpu_count()),
    "dims": _flag("2", COUNT, "number of classes"),
    "samples_per_class": _flag("2", COUNT, "training images of each class to score with"),
    "name_postfix": _flag("2", plain_name, "tells score files of one directory apart", "cmi"),
    "data_dir": {"stages": "2", **DATA_DIR},
    "seed": _flag("2", INDEX, "seed of the drawn images", 0),
    "device_ids": _flag("2", INDEX, GPU, 0),
    "classes": _flag("2", None, CLASSES, **MANY),
    "skip_unreadable": _flag("2", None, SKIP, action="store_true"),
    "estimator": _flag("2", tuple(ESTIMATORS), "estimator of the conditional mutual information", "kde"),
    "given": _flag(
        "2", ("rest", "kept"), "gaussian: given all other parents, or those left as the least go one by one (rest)"
    ),
    "width": _flag("2", POSITIVE, f"kde: kernel width in square roots of the number of parent units ({kde.WIDTH})"),
    "precision": _flag("2", tuple(kde.PRECISIONS), "kde: arithmetic of the scores (single)"),
    "device": _flag("2", ("cpu", "cuda"), "kde: where the scores are computed (cpu)"),
    "split_half": _flag("2", None, "also score two halves of the images; report their agreement", action="store_true"),
    "bootstrap": _flag("2", number(int, 2), "also standard errors of the scores, from so many halves of the images"),
    "null": _flag("2", COUNT, "also the scores' distribution without dependence, from so many permutations"),
    "grouping": _flag("2", ("index", "correlation"), "units of a group: neighbours, or those that correlate (index)"),
    "parent_clusters": _flag("23", COUNT, f"number of groups of parents: {BY_LAYER}", **MANY),
    "children_clusters": _flag(
        "23", COUNT, f"number of groups of children; the last layer keeps its classes: {BY_LAYER}", **MANY
    ),
    "key_id": _flag("23", INDEX, "which layer pair ('all': every one) or pruned share of the grid, from 0"),
}
# What makes no difference to the result and is not recorded.
UNRECORDED = {"cores", "Expt_rerun", "Device_ids", "device_ids", "Data_dir", "data_dir", "Workers", "Resume"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(doc: str, stage: int, argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """Parse a script's flags.

    Parameters
    ----------
    doc : the script's docstring
    stage : 1, 2 or 3
    argv : default: the command line
    **defaults : the script's values, by flag
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, flag in FLAGS.items():
        if str(stage) not in flag["stages"]:
            continue
        options = {"default": None, **flag, **({"default": defaults[name]} if name in defaults else {})}
        del options["stages"]
        if name in ("Model", "model"):
            options["choices"] = (options["default"],)
        if name == "key_id" and stage == 2:
            options |= {"required": True, "type": key_id_or_all}
        if options.get("type") is results_path and options["default"] is not None:
            options["default"] = under_results(options["default"])
        if options["default"] is not None and options.get("action") is None:
            options["help"] += f" (default: {_shown(options['default'])})"
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args(argv)


def _shown(value) -> str:
    """A flag's value in words."""
    if isinstance(value, Path):
        return public(value)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def recorded(args: argparse.Namespace) -> dict:
    """The arguments as records hold them: what decides the result, no path outside the repository."""
    return {
        flag: public(value) if isinstance(value, Path) else value
        for flag, value in sorted(vars(args).items())
        if flag not in UNRECORDED
    }


def recipe(args: argparse.Namespace) -> Recipe:
    """The training recipe that the flags ask for."""
    return Recipe(
        epochs=args.Epoch,
        batch_size=args.Batch_size,
        lr=args.Lr,
        milestones=tuple(args.Milestones),
        gamma=args.Gamma,
        weight_decay=args.Weight_decay,
        opt=args.Opt,
        nesterov=args.Nesterov,
        amp=args.Amp,
        compile=args.Compile,
    )


def set_dropout(args: argparse.Namespace, network: nn.Module) -> None:
    """Give all dropout layers the rate that --Dropout asks for."""
    if args.Dropout is None:
        return
    layers = [layer for layer in network.modules() if isinstance(layer, DROPOUT)]
    if not layers:
        raise InputError(f"--Dropout {args.Dropout:g}: {args.Model} has no dropout layers; leave the flag out")
    for layer in layers:
        layer.p = args.Dropout


def load_data(args: argparse.Namespace, on: torch.device) -> Data:
    """The data set of stages 1 and 3, split as the flags ask for."""
    if args.Select == "val" and args.Val_size == 0:
        raise InputError("--Val_size 0 leaves nothing to choose the best epoch by; give a size, or --Select test")
    return load(
        args.Dataset,
        args.Data_dir,
        val_size=args.Val_size if args.Select == "val" else 0,
        device=on,
        classes=args.Classes,
        workers=args.Workers,
        skip=args.Skip_unreadable,
    )


def check_data(args: argparse.Namespace, data: Data, checkpoint: dict | None = None) -> None:
    """Refuse a wrong number of classes, and a checkpoint of other data or of images that are now held out."""
    stage2 = "dims" in args
    dims = args.dims if stage2 else args.Dims
    if dims != data.classes:
        raise InputError(f"--{'dims' if stage2 else 'Dims'} {dims}: {data.name} has {data.classes} classes")
    for name, now in trained_on(data).items():
        before = (checkpoint or {}).get(name, now)
        if before != now:
            flag = name if stage2 else name.capitalize()
            raise InputError(f"--{flag} {_shown(now)}: the checkpoint was trained with {_shown(before)}; use the same")


def resolve_pairs(args: argparse.Namespace, pairs: list[tuple[str, str]], groups: dict, limits: dict) -> None:
    """Put the layer pairs that stage 3 prunes, their numbers of groups and their limits into the arguments.

    Parameters
    ----------
    pairs : (parent, child) of all layers
    groups : default numbers of parent and child groups, by child
    limits : default largest pruned share, by child; these layers are pruned unless others are named
    """
    parents = {child: parent for parent, child in pairs}
    args.children_key = args.children_key or list(limits)
    args.parent_key = args.parent_key or [parents.get(child, "?") for child in args.children_key]
    if len(args.parent_key) != len(args.children_key):
        raise InputError(
            f"--parent_key has {len(args.parent_key)} values, --children_key {len(args.children_key)}: give pairs"
        )
    for pair in zip(args.parent_key, args.children_key, strict=True):
        if pair not in pairs:
            raise InputError(f"--parent_key {pair[0]} --children_key {pair[1]} is no layer pair; legal: {_list(pairs)}")
    if len(set(args.children_key)) < len(args.children_key):
        raise InputError("--children_key names a layer twice")
    resolve_groups(args, args.children_key, groups)
    default = [limits.get(child, 1.0) for child in args.children_key]
    args.upper_prune_limit = one_per_pair("upper_prune_limit", args.upper_prune_limit or default, len(default))


def resolve_groups(args: argparse.Namespace, children: list[str], groups: dict[str, tuple[int, int]]) -> None:
    """Put numbers of groups, one per child layer, into the arguments."""
    for k, flag in enumerate(("parent_clusters", "children_clusters")):
        given = getattr(args, flag) or [groups[child][k] for child in children]
        setattr(args, flag, one_per_pair(flag, given, len(children)))


def check_save_dir(args: argparse.Namespace) -> None:
    """Refuse to write pruned networks among the files they are made from."""
    source = args.Retrain.parent
    if args.Save_dir in (source, source.parent):
        raise InputError(
            f"--Save_dir {public(args.Save_dir)} holds the checkpoint that is pruned; name another directory"
        )


def scoring_options(args: argparse.Namespace) -> dict:
    """The options of `scoring.score` that the flags ask for."""
    options = {"estimator": args.estimator, "n_jobs": args.cores, "seed": args.seed}
    options |= {"split_half": args.split_half, "bootstrap": args.bootstrap or 0, "null": args.null or 0}
    owner = {"width": "kde", "precision": "kde", "device": "kde", "given": "gaussian"}
    given = {flag: getattr(args, flag) for flag in owner if getattr(args, flag) is not None}
    for flag in given:
        if args.estimator != owner[flag]:
            raise InputError(f"--{flag} belongs to --estimator {owner[flag]}, not to {args.estimator}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this machine has no CUDA GPU")
        given["device"] = f"cuda:{args.device_ids}"
    return {**({"precision": "single"} if args.estimator == "kde" else {}), **options, **given}


def blocks_and_scores(
    args: argparse.Namespace, network: torch.nn.Module, pairs: list[tuple[str, str]]
) -> tuple[dict[str, Blocks], dict[str, np.ndarray] | None, list[Path]]:
    """Blocks and scores by child layer, and the files they were read from; without scores, blocks by the flags."""
    families = score_families(args)
    blocks, scores, files = {}, {}, []
    asked = zip(args.parent_key, args.children_key, args.parent_clusters, args.children_clusters, strict=True)
    for parent, child, *groups in asked:
        blocks[child] = contiguous_blocks(network, child, *groups)
        if families:
            remedy = f"run pruning_1b.py --key_id {pairs.index((parent, child))} with the same groups first"
            files += [artifacts.of_pair(family, parent, child) for family in families]
            scores[child], blocks[child] = scoring.load(files[-3:], blocks[child], remedy)
    return blocks, scores if families else None, files


def score_families(args: argparse.Namespace) -> list[Path]:
    """The families of score and label files that stage 3 reads; none for the controls unless they are named."""
    mask = args.Retrain_mask
    if mask is None:
        if not args.Criterion.startswith("cmi"):
            return []
        mask = args.Retrain.with_name("I_parent_cmi.npy")
    if not (mask.name.startswith("I_parent_") and mask.name.endswith(".npy")):
        raise InputError(
            f"--Retrain_mask {mask.name}: must be I_parent_<postfix>.npy, the name that stage 2 gives to scores"
        )
    beside = artifacts.score_families(mask.parent, mask.name.removeprefix("I_parent_").removesuffix(".npy"))
    return [mask, args.Labels_file or beside[1], args.Labels_children_file or beside[2]]


def share_of_masked(
    args: argparse.Namespace, share: float, network: torch.nn.Module, blocks: dict[str, Blocks]
) -> float:
    """The pruned share of the masked layers: the one asked for, which may be of all weights."""
    if not args.Prune_of_network:
        return share
    weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    masked = sum(b.weights.sum() for b in blocks.values())
    if share * weights > masked:
        raise InputError(f"{100 * share:g} % of the network: the masked layers hold {100 * masked / weights:.2f} %")
    return float(share * weights / masked)


def pruned_share(args: argparse.Namespace) -> float:
    """The pruned share that `--Prune_per`, or `--key_id` on the grid, asks for."""
    if (args.Prune_per is None) == (args.key_id is None):
        raise InputError("give either --key_id, to choose from the grid of pruned shares, or --Prune_per")
    if args.Prune_per is not None:
        return args.Prune_per
    if args.lower_prune_per > args.upper_prune_per:
        raise InputError(f"--lower_prune_per {args.lower_prune_per} is above --upper_prune_per {args.upper_prune_per}")
    steps = int((args.upper_prune_per - args.lower_prune_per) / args.prune_per_step + 1e-9)
    grid = [round(args.lower_prune_per + k * args.prune_per_step, 9) for k in range(steps + 1)]
    return grid[in_range("key_id", args.key_id, grid)]


def in_range(flag: str, index: int, choices: list) -> int:
    """The index, if it is one of a list's."""
    if index >= len(choices):
        raise InputError(f"--{flag} {index} is out of range; legal: {_list(choices)}")
    return index


def device(index: int) -> torch.device:
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


def training_device(args: argparse.Namespace) -> torch.device:
    """As `device`; settles --Amp, whose default depends on it."""
    chosen = device(args.Device_ids)
    if args.Amp is None:
        args.Amp = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
    return chosen


def one_per_pair(flag: str, values: list, pairs: int) -> list:
    """A list with one value per layer pair; a single value stands for all."""
    if len(values) not in (1, pairs):
        raise InputError(f"--{flag} has {len(values)} values for {pairs} layer pairs; give 1 or {pairs}")
    return values * pairs if len(values) == 1 else values


def run(main: Callable[[], None]) -> None:
    """Run a script: one line and exit code 2 for unusable input or means, 1 for diverged training, 130 for Ctrl-C."""
    name = Path(sys.argv[0]).name
    try:
        with parallel.processes():
            main()
    except InputError as error:
        sys.exit(_say(name, error, 2))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_say(name, f"{where}{error.strerror or reason(error)}; {GO_ON}", 2))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(_say(name, f"not enough memory ({reason(error)}); fewer --cores, a smaller --Batch_size; {GO_ON}", 2))
    except Diverged as error:
        sys.exit(_say(name, error, 1))
    except KeyboardInterrupt:
        _say(name, f"interrupted; {GO_ON}", 130)
        sys.stdout.flush()
        os._exit(130)  # at once: workers that are still at it would abort Python's own way out


def script(work: Callable) -> Callable:
    """A function that is a whole script: see `run`."""

    @functools.wraps(work)
    def wrapped(*args) -> None:
        run(lambda: work(*args))

    return wrapped


def _list(choices: list) -> str:
    """Choices with their indices, in words."""
    return ", ".join(f"{i}: {_shown(c)}" for i, c in enumerate(choices))


def _say(name: str, error, code: int) -> int:
    if parallel.rank() == 0:
        print(f"{name}: error: {error}", file=sys.stderr)
    return code
