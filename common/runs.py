"""One training run: its lock, its files, its record, and where it goes on after it was killed."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common import artifacts, parallel, records
from common.activations import check_outputs
from common.data import Data, FileSplit, Split, derived_seed
from common.errors import Diverged, InputError
from common.files import file_lock
from common.masks import Mask, sparsity_report
from common.training import Metrics, evaluate

# formats, by the last part of a figure's name
SHOWN = {"lr": ".4g", "loss": ".4f", "accuracy": ".2f", "seconds": ".1f", "epoch": ".0f"}


@contextlib.contextmanager
def start(best: Path, record: dict, data: Data, **options) -> Iterator["Run"]:
    """A `Run` that has its files to itself."""
    with file_lock(best):
        parallel.barrier()
        yield (run := Run(best, record, data, **options))
    torch.manual_seed(run.seed + 1)  # the next run's mask may be drawn: whether this one was there already is no matter


@dataclass
class Run:
    """A training run: `epochs` to loop over, `log` what came out, `finish`; `finished` if that is done already.

    Raises
    ------
    InputError
        If files of another run are there.
    """

    best: Path  # where the checkpoint of the epoch that is kept goes; record and state lie beside it
    record: dict  # what is known before it starts, with what makes it this run and no other (see `records`)
    data: Data
    _: KW_ONLY
    seed: int  # fixes first weights, order, augmentation, dropout; an epoch's randomness depends on (seed, epoch) alone
    select: str  # what chooses the epoch that is kept: "val", "last" (nothing: the last epoch) or "test"
    resume: bool  # go on where an interrupted run was; on a CPU the result is the same bits as without interruption
    remedy: str  # what to do where files of another run are there, for error messages
    mask: Mask | None = None  # what is kept at zero; goes into the checkpoints

    def __post_init__(self) -> None:
        more = {"seed": self.seed, "epoch_chosen_by": self.select, "processes": parallel.size()}
        self.record = {**self.record, **more, **records.environment(self.data.device)}
        self.mask = copy.deepcopy(self.mask)  # the file is named by it: what the script does with its own is no matter
        self.state_file = self.best.with_suffix(".state")
        self.finished = records.is_complete(self.best, self.record, self.remedy, describe)
        self.lines, self.kept, self.kept_state, self.highest = [], {"epoch": 0}, None, 0.0
        self.moments, self.start, self.next_save, self.titled = {}, time.perf_counter(), 0.0, False
        torch.manual_seed(self.seed)  # what is drawn from here on, such as a network's first weights

    def seed_of(self, epoch: int) -> int:
        """What fixes an epoch's randomness."""
        return derived_seed(self.seed, epoch)

    def epochs(
        self, count: int, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler, **more
    ) -> Iterator[int]:
        """Yield the epochs that are left, from 1 on or from where a killed run was; the objects go back there.

        `network` is what is kept, and refused if it does not return a number for every class; `more` by name: what else
        has a state_dict that the loop changes.
        """
        check_outputs(network, self.data.train, self.data.classes)
        self.parts = {"network": network, "optimizer": optimizer, "schedule": schedule, **more}
        taken = self._own_state().keys()
        if wrong := [name for name, part in more.items() if name in taken or not hasattr(part, "load_state_dict")]:
            raise InputError(f"run.epochs: {wrong[0]} has no state_dict, or a name of the run's own; name it otherwise")
        self._restore()
        self._weights()  # refuses what cannot be kept
        if count == 0:
            self._keep({"epoch": 0})
        elif parallel.rank() == 0:
            begun = f", goes on after epoch {len(self.lines)}" if self.lines else ""
            images = f"{len(self.data.train):,} training images"
            print(f"{self.best.parent}: seed {self.seed}, {images}, {self.data.device}{begun}")
        for epoch in range(len(self.lines) + 1, count + 1):
            self.epoch, self.began, self.rate = epoch, time.perf_counter(), float(optimizer.param_groups[0]["lr"])
            torch.manual_seed(self.seed_of(epoch) + parallel.rank())
            yield epoch
            if len(self.lines) != epoch:
                raise InputError("every epoch is logged once: call run.log(...) in the loop")
            self._save_state()

    def log(self, trained: Metrics, selected: Metrics | None = None, **more: float) -> None:
        """Print and note an epoch's figures, and keep its weights if it may be the best.

        `selected` are those of the images that choose the epoch; without them it is the last. Of the epochs whose
        accuracy on held-out images is within a standard error of the highest, the last is kept (Breiman et al., 1984):
        smaller differences are noise, and the last has learnt longest. A figure that is not finite raises Diverged.
        """
        line = {"epoch": self.epoch, "lr": self.rate, "train_loss": trained.loss, "train_accuracy": trained.accuracy}
        if selected is not None:
            line |= {"val_loss": selected.loss, "val_accuracy": selected.accuracy}
        if taken := {*line, "seconds"} & more.keys():
            raise InputError(f"run.log: every row has {', '.join(sorted(taken))} already; name yours otherwise")
        line |= {**more, "seconds": round(time.perf_counter() - self.began, 3)}
        line = {name: value.squeeze().tolist() if hasattr(value, "squeeze") else value for name, value in line.items()}
        if wrong := [name for name, value in line.items() if not isinstance(value, Real)]:
            raise InputError(f"run.log: {wrong[0]} is {line[wrong[0]]!r}; legal: a number")
        if wrong := [name for name, value in line.items() if not math.isfinite(value)]:
            self._diverge(", ".join(wrong))
        self.lines.append(line)
        if parallel.rank() == 0:
            titles = [] if self.titled else [_row(line, titles=True)]
            print(*titles, _row(line), sep="\n", flush=True)
            self.titled = True
        if selected is None:
            self._keep(line, write=self.epoch == 1)
            return
        self.highest = max(self.highest, selected.accuracy)
        error = math.sqrt(self.highest * (100 - self.highest) / len(self.data.selection))
        if selected.accuracy >= self.highest - error * (self.select == "val"):
            self._keep(line)

    def remember(self, moment: str, network: nn.Module) -> None:
        """Keep the weights as they are now; the record gets their test accuracy under that name, test_..."""
        if not moment.startswith("test_"):  # records have other entries
            raise InputError(f"run.remember: {moment!r} is no name for a moment; legal: 'test_' and more")
        self.moments[moment] = _state(network)

    def finish(self, network: nn.Module, test: Split | FileSplit, *, last: str | None = None) -> dict:
        """Read the test set, once; write the kept epoch's checkpoint and the record, and say what came out.

        The network holds the kept weights afterwards. The last epoch's go to the file `last`, with a record of its own.
        """
        measured = {}
        if last and self.lines:
            figures = {"last": self.lines[-1], "test": _measure(network, test)}
            content = self._checkpoint(network.state_dict(), self.lines[-1]["epoch"])
            records.save({self.best.with_name(last): content}, {**self.record, "status": "complete", **figures})
        moments = {**self.moments, "test": self.kept_state}
        for moment, state in moments.items():
            network.load_state_dict(state)
            twin = next((name for name in measured if _same(moments[name], state)), None)
            measured[moment] = measured[twin] if twin else _measure(network, test)
        if self.mask is not None:
            measured |= sparsity_report(network, self.mask)
        written = self._write("complete", **measured)
        if parallel.rank() == 0:
            self.state_file.unlink(missing_ok=True)
            if self.mask is not None:
                print(f"A mask alone makes nothing smaller or faster: python export_stage4.py --Checkpoint {self.best}")
            print(f"{self.best}: {describe(written)}")
        return written

    def _checkpoint(self, state: dict, epoch: int) -> bytes:
        extra = {"masks": dict(self.mask)} if self.mask is not None else {}
        return artifacts.checkpoint_bytes({"state_dict": state, "epoch": epoch, **trained_on(self.data), **extra})

    def _keep(self, figures: dict, *, write: bool = True) -> None:
        self.kept, self.kept_state = figures, self._weights()
        if write:
            self._write("running")

    def _weights(self) -> dict:
        """A copy of what is kept, the network's weights; refuses pruned ones that are not 0."""
        state = _state(self.parts["network"])
        for key, kept in (self.mask or {}).items():
            if state[key][~kept].any():
                hint = "call mask.apply first, mask.hold after all else that changes or reads them"
                raise InputError(f"{key}: pruned weights are not 0 after epoch {len(self.lines)}; {hint}")
        return state

    def _write(self, status: str, **measured) -> dict:
        seconds = round(time.perf_counter() - self.start, 1)
        known = {**self.record, "status": status, "best": self.kept, **measured, "wall_seconds": seconds}
        written = {**known, "epochs": self.lines}
        records.save({self.best: self._checkpoint(self.kept_state, self.kept["epoch"])}, written)
        return written

    def _diverge(self, what: str) -> None:
        known = records.record_path(self.best)
        if known.is_file():
            records.write(known, {**records.read(known), "status": "diverged"})
        kept = f"The best checkpoint so far, of epoch {self.kept['epoch']}, is kept." if self.lines else "Nothing kept."
        raise Diverged(f"{what} not finite after epoch {self.epoch}; lower `lr` (now {self.rate:g}). {kept}")

    def _restore(self) -> None:
        """Go on from the state of an interrupted run, if there is one and it is of this run."""
        remedy = "remove it, or start over with `no-resume`"
        begun = artifacts.load_state(self.state_file, remedy) if self.resume else None
        parallel.barrier()
        if begun is None:
            return
        if begun.get("format") != 2:
            raise InputError(f"{self.state_file} is of another version of this program; remove it")
        records.check_same(self.state_file, begun["record"], self.record, self.remedy)
        self.lines, self.kept, self.highest = begun["lines"], begun["kept"], begun["highest"]
        self.kept_state, self.start = begun["kept_state"], self.start - begun["seconds"]
        self.moments |= begun["moments"]
        for name, part in self.parts.items():
            part.load_state_dict(begun[name])

    def _own_state(self) -> dict:
        """What the state of an interrupted run holds beside its parts, whose names are others."""
        own = {"lines": self.lines, "kept": self.kept, "kept_state": self.kept_state, "highest": self.highest}
        own |= {"moments": self.moments, "seconds": time.perf_counter() - self.start, "record": self.record}
        return own | {"format": 2}

    def _save_state(self) -> None:
        """Note all that is needed to go on, now and then: so often that a twentieth of the time goes into it."""
        began = time.perf_counter()
        if began < self.next_save:
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        artifacts.save_state(self.state_file, parts | self._own_state())
        self.next_save = time.perf_counter() + 20 * (time.perf_counter() - began)


def _state(network: nn.Module) -> dict:
    """A copy of the network's weights, by their plain names; a wrapper's names are others."""
    inner = next(iter(network._modules), "")
    if inner in ("module", "_orig_mod", "network") and type(network).__module__.startswith(("torch.", "common.")):
        raise InputError(f"the network is in a {type(network).__name__}; give the run what is in it, its .{inner}")
    return copy.deepcopy(network.state_dict())


def _measure(network: nn.Module, test: Split | FileSplit) -> dict:
    return {name: value for name, value in asdict(evaluate(network, test)).items() if value is not None}


def _same(one: dict, other: dict) -> bool:
    """Whether two states of one network hold the same values; what a killed run left is on the CPU."""
    return all(torch.equal(one[name], other[name].to(one[name].device)) for name in one)


def trained_on(data: Data) -> dict:
    """What a checkpoint says of its data, so that scores and retraining keep to the same images."""
    return {"dataset": data.name, "val_size": len(data.val), "classes": list(data.chosen) if data.chosen else None}


def describe(record: dict) -> str:
    """What a finished run measured, in one line."""
    test = record["test"]
    chosen = f"epoch {record['best']['epoch']} by {record['epoch_chosen_by']}"
    if "pruned_percent_network" not in record:
        return f"test accuracy {test['accuracy']:.2f} % (top-5 {test.get('top5', math.nan):.2f} %), {chosen}"
    moments = [moment for moment in record if moment.startswith("test_")]
    arguments, by_layer = record["arguments"], record["pruned_percent_by_layer"]
    of = " of their multiply-adds" if arguments.get("Prune_of") == "macs" else ""
    if by_layer.keys() - arguments.get("children_key", by_layer):  # pruned in an earlier round
        of += " of those of this round"
    early = (f"{record[m]['accuracy']:.2f} % {m.removeprefix('test_').replace('_', ' ')}, " for m in moments)
    return (
        f"pruned {record['pruned_percent_masked_layers']:.2f} % of the masked layers "
        f"(asked: {record['requested_percent']:.2f} %{of}), {record['pruned_percent_network']:.2f} % of all weights; "
        f"test accuracy {''.join(early)}{test['accuracy']:.2f} % in the end ({chosen}); "
        f"memory {record['memory_mib_masked_layers']:.3f} MiB (masked layers), {record['memory_mib_network']:.3f} MiB"
    )


def _row(line: dict, *, titles: bool = False) -> str:
    """An epoch's figures, or their names, in columns."""
    cells = {name: format(value, SHOWN.get(name.split("_")[-1], ".4g")) for name, value in line.items()}
    return "  ".join((name if titles else cell).rjust(max(len(name), 7)) for name, cell in cells.items())
