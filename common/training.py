"""One epoch of training, evaluation, and learning-rate schedules; the recipe is the scripts'."""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR
from tqdm import tqdm

from common import parallel
from common.data import FileSplit, Split
from common.errors import InputError, reason

FEW = 1000  # test images
DROPOUT = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("steps", "cosine", "one-cycle")


@dataclass(frozen=True)
class Metrics:
    """Accuracy (top-1 and top-5) in per cent and the mean loss; cross-entropy in nats where it is evaluated.

    `right` has a digit for each of so few test images that rules are compared image by image: 1 where top-1 is right.
    """

    accuracy: float
    loss: float
    top5: float | None = None
    right: str | None = None


@torch.inference_mode()
def evaluate(network: nn.Module, split: Split | FileSplit | None, batch_size: int | None = None) -> Metrics | None:
    """Accuracy and loss of the network over a split, in evaluation mode and single precision; None without a split."""
    if split is None:
        return None
    network.eval()
    loss = correct = among5 = seen = torch.zeros((), device=split.labels.device)
    answers = []
    for images, labels in split.batches(batch_size):
        logits = network(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        correct, among5, seen = correct + hits[:, 0].sum(), among5 + hits.sum(), seen + len(labels)
        answers.append(hits[:, 0])
    loss, correct, among5, seen = parallel.total(loss, correct, among5, seen)
    few = len(split) <= FEW and parallel.size() == 1
    right = "".join(map(str, torch.cat(answers).int().cpu().numpy())) if few else None
    return Metrics(100 * correct / seen, loss / seen, 100 * among5 / seen, right)


def train_epoch(
    network: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    loss: Callable[[Tensor, Tensor], Tensor],
    teacher: nn.Module | None = None,
    taught: float = 0.0,
    *,
    amp: bool = False,
) -> Metrics:
    """One pass over the batches; the schedule moves after every one.

    Parameters
    ----------
    network : as `parallel.wrap` returns it
    batches : of images, labels and the number of images over all processes, see `Split.shuffled`; labels may also be
        shares of the classes, or a tuple whose first they are
    loss : of (logits, labels), summed over the images
    teacher, taught : another network, and the share of the loss that is the `distillation` of its answers
    amp : forward and backward passes in bfloat16 where that is safe (torch.autocast)

    Returns
    -------
    Metrics of every image as it was when it was trained on.
    """
    _check_recipe(loss, optimizer, schedule)
    network.train()
    device = next(network.parameters()).device
    images_seen, loss_sum, correct = 0, torch.zeros((), device=device), torch.zeros((), device=device)
    quiet = True if parallel.rank() else None  # a bar on process 0 alone, and there only on a terminal
    for images, labels, rows in tqdm(batches, unit="batch", leave=False, disable=quiet):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False):  # a graph forbids a cache
            logits = network(images)
        batch_loss = _loss(loss, logits, labels)
        if taught:
            batch_loss = (1 - taught) * batch_loss + taught * distillation(logits, teacher, images, amp)
        optimizer.zero_grad(set_to_none=True)
        (batch_loss * (parallel.size() / rows)).backward()  # averaged over processes, this is the mean over the batch
        optimizer.step()
        try:
            schedule.step()
        except ValueError as error:  # a schedule of torch's that is told how many steps there are
            raise InputError(f"the schedule moves once per batch ({reason(error)}); give it more steps") from error
        images_seen += rows
        loss_sum = loss_sum + batch_loss.detach()
        right = labels[0] if isinstance(labels, tuple) else labels
        correct = correct + (logits.detach().argmax(1) == (right.argmax(1) if right.ndim > 1 else right)).sum()
    parallel.broadcast_buffers(network)
    loss_sum, correct = parallel.total(loss_sum, correct)
    return Metrics(100 * correct / max(images_seen, 1), loss_sum / max(images_seen, 1))


def _loss(loss: Callable, logits: Tensor, labels: Tensor | tuple) -> Tensor:
    if not isinstance(logits, Tensor):
        raise InputError(f"in training the network returns a {type(logits).__name__}; legal: a tensor")
    summed = loss(logits.float(), labels)
    if summed.ndim:
        raise InputError(f"the loss returns {tuple(summed.shape)}; legal: one number, summed over the images")
    return summed


def distillation(logits: Tensor, teacher: nn.Module, images: Tensor, amp: bool = False) -> Tensor:
    """How far logits (n, classes) are from a teacher's of the same images: 16 KL divergences, in nats, summed.

    Of the probabilities at temperature 4; its square makes up for the smaller gradients (Hinton et al., 2015).
    """
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        answers = teacher.eval()(images)
    given, taught = (F.log_softmax(values.float() / 4, 1) for values in (logits, answers))
    return 16 * F.kl_div(given, taught, reduction="sum", log_target=True)


def _check_recipe(loss: Callable, *stepping: Optimizer | LRScheduler) -> None:
    """Refuse a loss of torch's that is a mean, by which steps would shrink with a batch, and steps with arguments."""
    reduction = getattr(loss, "reduction", "sum")
    with contextlib.suppress(KeyError, TypeError, ValueError):  # of functions without it, or without a signature
        reduction = inspect.signature(loss).parameters["reduction"].default
    if reduction != "sum":
        raise InputError(f"the loss has the reduction {reduction!r}; legal: 'sum', over the images")
    for part in stepping:
        try:
            inspect.signature(type(part).step).bind(part)  # of the class: a schedule wraps its optimizer's
        except (TypeError, AttributeError) as error:
            raise InputError(f"the step of {type(part).__name__}: {error}; legal: one without arguments") from error


def make_optimizer(name: str, parameters, lr: float, weight_decay: float, nesterov: bool) -> Optimizer:
    """SGD with momentum 0.9, or Adam."""
    if name == "sgd":
        return SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    if name == "adam":
        return Adam(parameters, lr, weight_decay=weight_decay, fused=True)
    raise InputError(f"`opt` {name} is none of {', '.join(OPTIMIZERS)}")


def make_schedule(
    optimizer: Optimizer, name: str, epochs: int, steps: int, milestones: list[int], gamma: float, warm_up: float
) -> LRScheduler:
    """A learning-rate schedule of torch that is moved once per batch, `steps` times an epoch.

    "steps": times `gamma` after each of the `milestones`, in epochs; "cosine": falls to 0 along half a wave;
    "one-cycle": rises to the optimizer's rate in the share `warm_up` of all batches, then falls (Smith, 2018).
    """
    total = max(1, epochs * steps)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, total)
    if name == "one-cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = 0.0 if warm_up * total == 1 else min(float(warm_up), 1 - 1e-9)  # torch would divide by 0
        return OneCycleLR(optimizer, rates, total, pct_start=rising, cycle_momentum=False)
    if name == "steps":
        return MultiStepLR(optimizer, [steps * epoch for epoch in milestones], gamma)
    raise InputError(f"`schedule` {name} is none of {', '.join(SCHEDULES)}")


def set_dropout(network: nn.Module, rate: float | None) -> nn.Module:
    """Give all dropout layers this rate, or leave them as they are where it is None; returns the network."""
    layers = [layer for layer in network.modules() if isinstance(layer, DROPOUT)]
    if rate is not None and not layers:
        raise InputError(f"`dropout` {rate:g}: this network has no dropout layers; leave it out")
    for layer in layers:
        layer.p = layer.p if rate is None else rate
    return network
