"""Fit and evaluate a classifier."""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import parallel
from common.data import FileSplit, Split, derived_seed
from common.errors import Diverged

OPTIMIZERS = {
    "sgd": lambda parameters, r: torch.optim.SGD(
        parameters, r.lr, momentum=r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov, fused=True
    ),
    "adam": lambda parameters, r: torch.optim.Adam(parameters, r.lr, weight_decay=r.weight_decay, fused=True),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the learning rate is multiplied by `gamma` at every milestone (in epochs).

    Attributes
    ----------
    batch_size : images per step, over all processes
    amp : forward and backward passes in bfloat16 where that is safe (torch.autocast)
    compile : forward and backward passes through torch.compile
    """

    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]
    gamma: float
    weight_decay: float
    opt: str = "sgd"
    nesterov: bool = True
    momentum: float = 0.9
    amp: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Score:
    """Accuracy (top-1 and top-5) in per cent and mean cross-entropy in nats."""

    accuracy: float
    loss: float
    top5: float


@torch.inference_mode()
def evaluate(network: nn.Module, split: Split | FileSplit, batch_size: int | None = None) -> Score:
    """Accuracy and loss of the network over a split, in evaluation mode and single precision."""
    network.eval()
    loss = correct = among5 = seen = torch.zeros((), device=split.labels.device)
    for images, labels in split.batches(batch_size):
        logits = network(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        correct, among5, seen = correct + hits[:, 0].sum(), among5 + hits.sum(), seen + len(labels)
    loss, correct, among5, seen = parallel.total(loss, correct, among5, seen)
    return Score(100 * correct / seen, loss / seen, 100 * among5 / seen)


def train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, split: Split | FileSplit, recipe: Recipe, seed: int
) -> tuple[float, float]:
    """One pass over the split; order, augmentation and dropout are drawn from `seed`.

    Returns
    -------
    Mean loss in nats and accuracy in per cent, of every image as it was when it was trained on.
    """
    torch.manual_seed(seed + parallel.rank())
    network.train()
    device, images_seen = split.labels.device, 0
    loss_sum = correct = torch.zeros((), device=device)
    for images, labels, rows in split.training_batches(recipe.batch_size, seed):
        with torch.autocast(device.type, torch.bfloat16) if recipe.amp else contextlib.nullcontext():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        (loss * (parallel.size() / rows)).backward()  # averaged over processes, this is the mean over the batch
        optimizer.step()
        images_seen += rows
        loss_sum = loss_sum + loss.detach()
        correct = correct + (logits.detach().argmax(1) == labels).sum()
    loss_sum, correct = parallel.total(loss_sum, correct)
    return loss_sum / max(images_seen, 1), 100 * correct / max(images_seen, 1)


def fit(
    network: nn.Module,
    train: Split | FileSplit,
    val: Split | FileSplit | None,
    recipe: Recipe,
    *,
    seed: int,
    tolerance: float = 1.0,
    after_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_best: Callable[[dict, dict[str, Tensor]], None] | None = None,
    on_state: Callable[[Callable[[], dict]], None] | None = None,
    start: dict | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Train by the recipe and keep the epoch that does best on `val`, or the last one if there is no `val`.

    Of the epochs whose accuracy on `val` is within `tolerance` standard errors of the best, the last is kept (the
    one-standard-error rule of Breiman et al., 1984): smaller differences are noise, and the last has learnt longest.

    Parameters
    ----------
    network : trained in place; holds the last epoch's weights afterwards
    tolerance : in standard errors of an accuracy measured on `val`; 0 keeps the last of the very best
    seed : fixes order, augmentation and dropout; an epoch's randomness depends on (seed, epoch) alone
    after_step : called after every optimizer step, e.g. to hold masked weights at zero
    on_epoch : called with one line of figures per epoch
    on_best : called with those figures and a copy of the weights when an epoch is the best so far
    on_state : called after every epoch with a function that returns all that is needed to go on from there
    start : what that function returned, to go on; on a CPU the result is the same bits as without interruption

    Returns
    -------
    The figures of the best epoch and its weights.

    Raises
    ------
    Diverged
        At the end of the first epoch whose loss is not finite. What `on_best` was given before remains good.
    """
    optimizer = OPTIMIZERS[recipe.opt](network.parameters(), recipe)
    if after_step is not None:
        optimizer.register_step_post_hook(lambda *_: after_step())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), recipe.gamma)
    done, best, best_state, highest = 0, {}, {}, 0.0
    if start is not None:
        done, best, best_state, highest = (start[k] for k in ("epoch", "best", "best_state", "highest"))
        for part, name in ((network, "network"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(start[name])
    trained = parallel.wrap(network)
    trained = torch.compile(trained) if recipe.compile else trained
    with tqdm(
        range(done + 1, recipe.epochs + 1), initial=done, total=recipe.epochs, unit="epoch", disable=_quiet()
    ) as progress:
        for epoch in progress:
            began = time.perf_counter()
            lr = schedule.get_last_lr()[0]
            loss, accuracy = train_epoch(trained, optimizer, train, recipe, derived_seed(seed, epoch))
            parallel.same_buffers(network)
            line = {"epoch": epoch, "lr": lr, "train_loss": loss, "train_accuracy": accuracy}
            if val is not None:
                score = evaluate(network, val)
                line |= {"val_loss": score.loss, "val_accuracy": score.accuracy}
                highest = max(highest, score.accuracy)
            line["seconds"] = round(time.perf_counter() - began, 3)
            if not all(math.isfinite(value) for value in line.values()):
                raise Diverged(
                    f"the loss is not finite after epoch {epoch}; lower --Lr (now {recipe.lr:g}). "
                    + (f"The best checkpoint so far, of epoch {best['epoch']}, is kept." if best else "Nothing kept.")
                )
            schedule.step()
            progress.set_postfix(loss=f"{loss:.4f}", accuracy=f"{line.get('val_accuracy', accuracy):.2f}%")
            if on_epoch is not None:
                on_epoch(line)
            if val is None or score.accuracy >= highest - tolerance * math.sqrt(highest * (100 - highest) / len(val)):
                best, best_state = line, copy.deepcopy(network.state_dict())
                if on_best is not None:
                    on_best(best, best_state)
            if on_state is not None:
                on_state(
                    lambda epoch=epoch, best=best, best_state=best_state, highest=highest: {
                        "epoch": epoch,
                        "best": best,
                        "best_state": best_state,
                        "highest": highest,
                        "network": network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                    }
                )
    return best, best_state


def _quiet() -> bool | None:
    """No progress bar but on process 0, and there only on a terminal."""
    return True if parallel.rank() else None
