"""Fit and evaluate a classifier on data that lie on the device."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.data import Split, batches
from common.errors import Diverged

OPTIMIZERS = {
    "sgd": lambda parameters, r: torch.optim.SGD(
        parameters, r.lr, momentum=r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov, fused=True
    ),
    "adam": lambda parameters, r: torch.optim.Adam(parameters, r.lr, weight_decay=r.weight_decay, fused=True),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the learning rate is multiplied by `gamma` at every milestone (in epochs)."""

    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]
    gamma: float
    weight_decay: float
    opt: str = "sgd"
    nesterov: bool = True
    momentum: float = 0.9


@dataclass(frozen=True)
class Score:
    """Accuracy in per cent and mean cross-entropy in nats."""

    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(network: nn.Module, split: Split, batch_size: int = 5000) -> Score:
    """Accuracy and loss of the network over a split, in evaluation mode."""
    network.eval()
    loss = correct = torch.zeros((), device=split.labels.device)
    for images, labels in batches(split, batch_size):
        logits = network(images)
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
    return Score(100 * correct.item() / len(split), loss.item() / len(split))


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for everything random in an epoch, so that an epoch can be repeated on its own."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, split: Split, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """One pass over the split in an order drawn from `seed`; returns the summed loss and the number correct."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    network.train()
    loss_sum = correct = torch.zeros((), device=split.labels.device)
    for images, labels in batches(split, batch_size, shuffle):
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum = loss_sum + loss.detach() * len(labels)
        correct = correct + (logits.detach().argmax(1) == labels).sum()
    return loss_sum, correct


def fit(
    network: nn.Module,
    train: Split,
    val: Split | None,
    recipe: Recipe,
    *,
    seed: int,
    tolerance: float = 1.0,
    after_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_best: Callable[[dict, dict[str, Tensor]], None] | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Train by the recipe and keep the epoch that does best on `val`, or the last one if there is no `val`.

    Of the epochs whose accuracy on `val` is within `tolerance` standard errors of the best, the last is kept (the
    one-standard-error rule of Breiman et al., 1984): smaller differences are noise, and the last has learnt longest.

    Parameters
    ----------
    network : trained in place; holds the last epoch's weights afterwards
    tolerance : in standard errors of an accuracy measured on `val`; 0 keeps the last of the very best
    seed : fixes order and dropout; an epoch's randomness depends on (seed, epoch) alone
    after_step : called after every optimizer step, e.g. to hold masked weights at zero
    on_epoch : called with one line of figures per epoch
    on_best : called with those figures and a copy of the weights when an epoch is the best so far

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
    best, best_state, highest = {}, {}, 0.0
    with tqdm(range(1, recipe.epochs + 1), unit="epoch", disable=None) as progress:
        for epoch in progress:
            start = time.perf_counter()
            lr = schedule.get_last_lr()[0]
            loss, correct = train_epoch(network, optimizer, train, recipe.batch_size, epoch_seed(seed, epoch))
            line = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": loss.item() / len(train),
                "train_accuracy": 100 * correct.item() / len(train),
            }
            if val is not None:
                score = evaluate(network, val)
                line |= {"val_loss": score.loss, "val_accuracy": score.accuracy}
                highest = max(highest, score.accuracy)
            line["seconds"] = round(time.perf_counter() - start, 3)
            if not all(math.isfinite(value) for value in line.values()):
                raise Diverged(
                    f"the loss is not finite after epoch {epoch}; lower --Lr (now {recipe.lr:g}). "
                    + (f"The best checkpoint so far, of epoch {best['epoch']}, is kept." if best else "Nothing kept.")
                )
            schedule.step()
            shown = line["train_accuracy"] if val is None else score.accuracy
            progress.set_postfix(loss=f"{line['train_loss']:.4f}", accuracy=f"{shown:.2f}%")
            if on_epoch is not None:
                on_epoch(line)
            if val is None or score.accuracy >= highest - tolerance * math.sqrt(highest * (100 - highest) / len(val)):
                best = line
                best_state = copy.deepcopy(network.state_dict())
                if on_best is not None:
                    on_best(best, best_state)
    return best, best_state
