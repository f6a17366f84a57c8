"""Stage 4: files that need nothing of this project, and networks without the channels that a mask leaves idle.

A network becomes a graph of torch's own operations (torch.export). Which channels can go is read off their values:
images are unknown, which is NaN, so that what is not NaN is the same for all images. Packages of
requirements-export.txt are imported where they are used: the other stages do without.
"""

import copy
import io
import json
import logging
import math
import operator
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from common.errors import InputError, reason
from common.masks import memory

PACKAGES = ("safetensors", "onnx", "onnxscript", "onnxruntime")
LAYERS = {"linear": 2, "conv1d": 3, "conv2d": 4}  # operations that mix channels, and axes of what they read
FLATTEN, JOIN, NORM = {"flatten", "view", "reshape"}, {"add", "sub", "mul"}, "batch_norm"
# operations that make channel k of channel k of what they read; those of the second line under the same names in place
APART = {NORM, "mean", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d"} | JOIN | FLATTEN
APART |= {"adaptive_avg_pool2d", "dropout", "clone", "contiguous", "relu", "hardtanh", "leaky_relu", "elu", "selu"}
APART |= {"relu6", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "hardswish", "hardsigmoid"}
ROUNDING = 1e-5  # largest difference of outputs, as a share of the largest output
NOTHING = "no channel is removed: all others are read by some weight and depend on the images"
warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's, of itself
BATCHES, ROUNDS = (1, 64), 3  # images in what is timed; how often at least, after once to warm up


def trace(network: nn.Module, images: Tensor) -> ExportedProgram:
    """The network, in evaluation mode, as a graph of torch's operations, for any number of such images."""
    if not isinstance(network, fx.GraphModule):  # whose mode is fixed
        network.eval()
    two = images[torch.arange(2) % len(images)]  # a dimension of 1 would count as fixed
    try:
        program = torch.export.export(network, (two,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except Exception as error:  # whatever the network's code leads torch to
        raise InputError(f"torch.export cannot follow the network ({reason(error)})") from error
    for node in program.graph.nodes:  # files hold no traces of where the code lay, half of their size
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")}
    return program


def shrink(program: ExportedProgram, images: Tensor) -> tuple[ExportedProgram, dict]:
    """The network without the channels that do nothing, and what went.

    A channel goes if all weights that read it are 0, or if it is the same for all images and what it adds to the layers
    that read it is the same everywhere: that goes into their biases. (Where a convolution pads with zeros, that is so
    of 0 alone.) A channel of values that are added goes if it goes from all of them. One channel of each layer stays.

    Returns
    -------
    The network, and "layers": shapes before and after by name of the weight; "notes": why idle channels stay.
    """
    module = program.module(check_guards=False)
    before = {name: list(weight.shape) for name, weight in module.named_parameters() if weight.ndim > 1}
    while True:
        try:
            graph, cuts, notes = _Graph(module, images), {}, Counter()
        except Exception as error:  # whatever unknown values lead operations to
            return program, {"layers": {}, "notes": [f"the network fails on unknown values ({reason(error)})"]}
        for space in graph.spaces:
            idle = graph.idle(space)
            if space.fixed:
                notes[f"needed by {', '.join(sorted(space.fixed))}"] += int(idle.sum())
                continue
            idle[0] &= not idle.all()
            if idle.any():
                cuts[space] = idle
        if not cuts:
            break
        graph.cut(cuts)
    notes["not 0, and read by a convolution that pads with 0"] = graph.uneven
    after = {name: list(weight.shape) for name, weight in module.named_parameters()}
    layers = {name: [old, after[name]] for name, old in before.items() if after[name] != old}
    notes = [f"{count} idle channels stay: {why}" for why, count in notes.items() if count]
    module.graph.eliminate_dead_code()
    module.recompile()
    return trace(module, images) if layers else program, {"layers": layers, "notes": notes}


@dataclass(eq=False)
class _Space:
    """Values with one set of channels between them: what is cut from one must be cut from all."""

    values: list[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)  # layers that read one of them
    fixed: set[str] = field(default_factory=set)  # operations that need the channels as they are


class _Graph:
    """A traced network, its values for unknown images, and which of them share channels."""

    def __init__(self, module: fx.GraphModule, images: Tensor) -> None:
        self.module, self.nodes = module, module.graph.nodes
        attributes = [node for node in self.nodes if node.op == "get_attr"]
        uses = Counter(node.target for node in attributes for _ in node.users)
        self.owned = {node for node in attributes if uses[node.target] == 1}  # parameters that are used once
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.added: dict[fx.Node, dict[int, Tensor]] = {}  # by layer what inputs that are known add to its outputs
        self.uneven = 0  # inputs that are known, but do not add the same everywhere
        self._run(torch.full_like(images[:1], math.nan))
        self.spaces = self._spaces()

    def idle(self, space: _Space) -> Tensor:
        """Which channels (c,) of a space nobody reads, or are the same for all images in a way that a bias can hold."""
        channels = math.gcd(*(self.shapes[value][1] for value in space.values))  # of maps, and of flattened maps
        idle = torch.ones(channels, dtype=torch.bool)
        for layer in space.readers:
            weight = self._tensor(layer.args[1])
            dispensable = (weight == 0).transpose(0, 1).flatten(1).all(1)
            dispensable[list(self.added[layer])] = True
            idle &= dispensable.reshape(len(idle), -1).all(1)
        return idle

    def cut(self, idle: dict[_Space, Tensor]) -> None:
        """Remove idle channels; what they added to the layers that read them goes into these layers' biases."""
        for space, gone in idle.items():  # inputs first: what they add has as many outputs as the layer has now
            for layer in space.readers:
                weight = self._tensor(layer.args[1])
                columns = gone.repeat_interleave(weight.shape[1] // len(gone))
                added = [shift for k, shift in self.added[layer].items() if columns[k] and shift.any()]
                if added:
                    self._add_to_bias(layer, torch.stack(added).sum(0))
                self._set(layer.args[1], weight[:, ~columns])
        for space, gone in idle.items():
            for value in space.values:
                rows = gone.repeat_interleave(self.shapes[value][1] // len(gone))
                for argument in value.args[1:3] if value in self.added else value.args[1:5] * (_name(value) == NORM):
                    if argument is not None:
                        self._set(argument, self._tensor(argument)[~rows])

    @torch.no_grad()
    def _run(self, images: Tensor) -> None:
        values, parts = {}, {}  # parts: by the memory of what became unknown what it was, maybe a view of another
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.get)
            if node.op in ("placeholder", "get_attr"):
                value = images if node.op == "placeholder" else self._tensor(node).clone()  # may be changed in place
            elif node.op == "output":
                break
            elif self._is_layer(node):
                value, self.added[node], uneven = _read(node.target, *args)
                self.uneven += uneven
            else:
                value = node.target(*args, **kwargs)
                tensors = [value, *(a for a in args if isinstance(a, Tensor))]
                apart = _name(node) in APART and all(t.is_floating_point() for t in tensors)
                floating = isinstance(value, Tensor) and value.is_floating_point()
                if floating and "_." in str(node.target):
                    changed = value if apart else value.fill_(math.nan)
                    while (changed := parts.pop(_memory(changed), None)) is not None:
                        changed.fill_(math.nan)
                elif floating and not apart:
                    seen, value = value, torch.full_like(value, math.nan)
                    parts[_memory(value)] = seen
            values[node] = value
            if isinstance(value, Tensor) and node.op != "get_attr":
                self.shapes[node] = value.shape

    def _spaces(self) -> list[_Space]:
        space_of = {node: _Space([node]) for node in self.shapes}
        for node in self.nodes:
            sources = [source for source in node.all_input_nodes if source in space_of]
            if node in self.added:
                space_of[sources[0]].readers.append(node)
            elif sources and self._keeps_channels(node, sources):
                for one in {space_of[source] for source in sources}:
                    whole = space_of[node]
                    whole.values, whole.readers = whole.values + one.values, whole.readers + one.readers
                    whole.fixed |= one.fixed
                    space_of.update(dict.fromkeys(one.values, whole))
            else:
                for other in {node, *sources} & space_of.keys():
                    space_of[other].fixed.add(_name(node))
        return [space for space in dict.fromkeys(space_of.values()) if space.readers]

    def _keeps_channels(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether channel k of the value depends on channel k of its sources alone."""
        name, shapes = _name(node), [self.shapes.get(value, ()) for value in (node, *sources)]
        attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
        if name not in APART or min(map(len, shapes)) < 2 or not self.owned.issuperset(attributes):
            return False
        one, first, *_ = shapes
        if name in FLATTEN:
            flat = one == (first[0], first[1:].numel())
            if flat:  # whatever sizes were written down
                node.target, node.args = torch.ops.aten.flatten.using_ints, (sources[0], 1)
            return flat
        if name == "mean":
            return len(node.args) > 1 and all(axis % len(first) > 1 for axis in node.args[1] or [0])
        if "pool" in name and len(first) != 2 + int(name[-2]):  # without an axis for images: the second is pooled
            return False
        if name == NORM:
            return node.args[5] is False and len(sources) == 1
        return not attributes and all(len(other) == len(one) and other[1] == one[1] for other in shapes[1:])

    def _is_layer(self, node: fx.Node) -> bool:
        """Whether the node is a layer that can be cut: it reads vectors or maps by weights of its own, in one group."""
        axes, (read, *parameters) = LAYERS.get(_name(node)), node.args[:3] or (None,)
        owned = axes and self.owned.issuperset(parameter for parameter in parameters if parameter is not None)
        return owned and len(self.shapes.get(read, ())) == axes and node.args[6:7] in ((), (1,))

    def _tensor(self, node: fx.Node) -> Tensor:
        return operator.attrgetter(node.target)(self.module)

    def _set(self, node: fx.Node, value: Tensor) -> None:
        owner, _, name = node.target.rpartition(".")
        parameter = isinstance(self._tensor(node), nn.Parameter)
        setattr(self.module.get_submodule(owner), name, nn.Parameter(value.detach()) if parameter else value)

    def _add_to_bias(self, layer: fx.Node, added: Tensor) -> None:
        bias = layer.args[2] if len(layer.args) > 2 else None
        if bias is None:
            owner = layer.args[1].target.rpartition(".")[0]
            self.module.get_submodule(owner).folded_bias = nn.Parameter(torch.zeros_like(added))
            with self.module.graph.inserting_before(layer):
                bias = self.module.graph.get_attr(f"{owner}.folded_bias".removeprefix("."))
            layer.args = (*layer.args[:2], bias, *layer.args[3:])
        self._set(bias, self._tensor(bias) + added)


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _name(node: fx.Node) -> str:
    """An operation by torch's name, in place or not."""
    return str(node.target).removeprefix("aten.").split(".")[0].removesuffix("_")


def _read(operation, values: Tensor, weight: Tensor, bias: Tensor | None = None, *rest) -> tuple:
    """What a layer returns, NaN where it depends on an unknown input; what each known input k adds to its outputs, by k
    if it is the same everywhere; and of how many that is not so.
    """
    unknown = values.isnan().transpose(0, 1).flatten(1).any(1)
    known = values.clone()
    known[:, unknown] = 0
    outputs, added, uneven = operation(known, weight, bias, *rest), {}, 0
    outputs[:, (weight[:, unknown] != 0).flatten(1).any(1)] = math.nan
    for k in (~unknown).nonzero().flatten().tolist():
        alone = operation(known[:, k : k + 1], weight[:, k : k + 1], None, *rest)[0].reshape(len(weight), -1)
        if (alone - alone[:, :1]).abs().max() <= ROUNDING * alone.abs().max():
            added[k] = alone[:, 0]
        else:
            uneven += 1
    return outputs, added, uneven


def pack(state: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """Weights as a safetensors file: a bit per value and the values that are not 0, where that is smaller.

    Of such a tensor there are NAME:bits, eight values a byte, the first in the highest bit, and NAME:values; its shape
    is in the metadata's "shapes", as JSON by name. docs/export.md shows how to read them.
    """
    from safetensors.torch import save

    tensors, shapes = {}, {}
    for name, tensor in state.items():
        bits, values = torch.from_numpy(np.packbits((tensor != 0).numpy())), tensor[tensor != 0]
        if bits.nbytes + values.nbytes < tensor.nbytes:
            tensors[f"{name}:bits"], tensors[f"{name}:values"], shapes[name] = bits, values, list(tensor.shape)
        else:
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    content = save(tensors, {**about, "shapes": json.dumps(shapes)})
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:size]), sort_keys=True).encode()  # its own order is another every time
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[size:]


def files(network: nn.Module, shrunk: ExportedProgram, about: dict[str, str]) -> dict[str, bytes]:
    """By suffix all weights, and what torch.export.load and ONNX read without this project's code."""
    pt2 = io.BytesIO()
    torch.export.save(shrunk, pt2)
    return {".safetensors": pack(network.state_dict(), about), ".pt2": pt2.getvalue(), ".onnx": onnx_bytes(shrunk)}


def onnx_bytes(program: ExportedProgram) -> bytes:
    """The network for onnxruntime and others, for any number of images."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"ONNX has no form for the network ({reason(error)})") from error


def onnx_runner(content: bytes, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A function of images that runs an ONNX file on the CPU."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others are measured in turn
    try:
        session = InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # a RuntimeError for each of its own errors, and of other kinds
        raise InputError(f"onnxruntime cannot run the network ({reason(error)})") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@torch.no_grad()
def check(files: dict[str, bytes], network: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest difference of each file's outputs from the network's, as a share of the largest output, by suffix.

    An InputError if it is more than rounding.
    """
    loaded = torch.export.load(io.BytesIO(files[".pt2"])).module()
    outputs = {".pt2": loaded(images), ".onnx": onnx_runner(files[".onnx"])(images)}
    expected, found = network(images), {}
    for suffix, values in outputs.items():
        found[suffix] = float((values - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo().tiny))
        if not found[suffix] <= ROUNDING:
            raise InputError(f"the {suffix} has other outputs, by {found[suffix]:.1e} of the largest; none is written")
    return found


def sizes(
    masked: ExportedProgram, shrunk: ExportedProgram, network: nn.Module, files: dict[str, bytes], images: Tensor
) -> dict:
    """Parameters, those that are not 0 and multiply-adds for an image, before and after; bytes of all files."""
    found = {}
    for name, program in (("masked", masked), ("shrunk", shrunk)):
        parameters = list(program.parameters())
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            program.module(check_guards=False)(images[:1])
        counts = {"parameters": sum(p.numel() for p in parameters), "multiply_adds": flops.get_total_flops() // 2}
        found[name] = {**counts, "not_zero": sum(int(p.count_nonzero()) for p in parameters)}
    found["bytes"] = {"dense": sum(value.nbytes for value in network.state_dict().values())}
    found["bytes"] |= {suffix: len(content) for suffix, content in files.items()}
    return {**found, "memory_mib_network": memory(list(network.modules()))}


@torch.no_grad()
def latencies(
    masked: ExportedProgram, shrunk: ExportedProgram, images: Tensor, threads: list[int], seconds: float
) -> list[dict]:
    """Milliseconds of a batch on the CPU, medians, in torch and in onnxruntime; all forms in random turns.

    "dense" is the masked network with small numbers where its weights are 0.
    """
    programs, measured = {"dense": copy.deepcopy(masked), "masked": masked, "shrunk": shrunk}, []
    for parameter in programs["dense"].parameters():
        parameter.data[parameter == 0] = 1e-3
    files = {name: onnx_bytes(program) for name, program in programs.items()} if seconds else {}
    for count, batch in product(threads, BATCHES) if seconds else ():
        torch.set_num_threads(count)
        calls = {f"torch {name}": program.module(check_guards=False) for name, program in programs.items()}
        calls |= {f"onnxruntime {name}": onnx_runner(content, count) for name, content in files.items()}
        rows, times = images[torch.arange(batch) % len(images)], {name: [] for name in calls}
        end, turns = time.perf_counter() + seconds, random.Random(0)  # others at work are as regular as fixed turns
        while len(times["torch masked"]) <= ROUNDS or time.perf_counter() < end:
            for name in turns.sample(list(calls), len(calls)):
                began = time.perf_counter()
                calls[name](rows)
                times[name].append(1000 * (time.perf_counter() - began))
        medians = {name: round(statistics.median(taken[1:]), 4) for name, taken in times.items()}
        measured.append({"threads": count, "batch": batch, "rounds": len(times["torch masked"]) - 1, "ms": medians})
    return measured


def table(record: dict) -> str:
    """What an export measured, for the terminal."""
    masked, shrunk = record["masked"], record["shrunk"]
    lines = [f"{name}: masked {masked[name]:,}, shrunk {shrunk[name]:,}" for name in masked]
    gone = sum(before[0] - after[0] for before, after in record["layers"].values())
    lines += [f"{gone:,} channels are removed" if gone else NOTHING, *record["notes"]]
    measure = f"the paper's memory measure {record['memory_mib_network']:.3f} MiB"
    lines.append("bytes: " + ", ".join([*(f"{name} {size:,}" for name, size in record["bytes"].items()), measure]))
    for row, engine in product(record["latency"], ("torch", "onnxruntime")):
        times = {form: row["ms"][f"{engine} {form}"] for form in ("dense", "masked", "shrunk")}
        said = (f"{form} {ms:.3f} ms (x {ms / times['dense']:.2f})" for form, ms in times.items())
        lines.append(f"batch {row['batch']}, threads {row['threads']}, {engine}: {', '.join(said)}")
    return "\n".join(lines)
