"""What a rank sends and keeps in a step: counted where it happens, and worked out on paper.

Counted: every collective of torch, whoever calls it (DeepSpeed, this project, autograd in a backward), goes through one
of the operators torch.ops.c10d.*, which `Traffic` sees with the process group that it runs on. A collective it does not
know is an error, so that none is left out. Not the packets are counted, but what the best algorithm must send for it,
of n bytes over p ranks:

    all-reduce                2 (p - 1) / p n         reduce-scatter, all-to-all    (p - 1) / p n
    all-gather                (p - 1) / p n, n of all ranks together
    broadcast, reduce         (p - 1) / p n, the mean over the ranks of a chain
    send                      n                       receive, barrier              0

On the loopback device of a machine with nothing else on it, gloo sends that within 1%, but for its reduce-scatter: that
is an all-reduce of which each rank keeps a part, and sends twice as much. NCCL's is a real one.

On paper, for one rank, its layers l, micro-batches m of b sequences, t = seq_len / cp positions, h = hidden, e bytes of
an activation or weight, g of a gradient in its reduction, P parameters that the rank's stage has after tensor
parallelism, d = dp * cp, R(p) = (p - 1) / p, u = b t h e:

    dp  ZeRO-1  P g 2 R(d) + P e R(d)            all-reduce of the gradients, all-gather of the updated weights; a
    dp  ZeRO-2  m P g 2 R(d) + P e R(d)          reduce-scatter would do with half: DeepSpeed makes it an all-reduce.
                                                 ZeRO-2 keeps no whole gradients, and reduces every micro-batch
    dp  ZeRO-3  m P g R(d) + 2 m P e R(d)        matrices are gathered for every forward and for every backward (the
                                                 last layers less often: their backward comes at once), norms once a
                                                 step, and with gather: step everything
    tp          2 R(tp) u m (4 l + first + last) all-reduces: two forward and two backward for each layer, the output of
                                                 the embedding, the gradient of the head's input. With sequence
                                                 parallelism each is a reduce-scatter and an all-gather: the same. And
                + 2 R(tp) 3 b t 4 m last         three float32 numbers for each token of the vocabulary-parallel loss
                + 2 R(tp) h e m (2 l + last)     gradients of the norms, with sequence parallelism only
                + 2 R(copies) b t D e m 2 l      gradients of keys and values of head_dim D on `copies` ranks
                + recomputed layers m 2 R(tp) u  the forward's once more with `full` or every N-th; with sequence
                                                 parallelism 3 R(tp) u. The last collective of a layer is not needed
    pp          u m / sp for each boundary that the rank sends over, forward or backward; sp = tp with sequence
                                                 parallelism, else 1. Tied weights: V h / tp / d of 4 bytes each way
    cp          2 R(cp) m l b t e D (2 q + 2 k)  all-to-alls of q query heads, max(key/value heads, cp) = k twice, and
                                                 q outputs; forward and backward, half of it again if recomputed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from llama_dist.config import RunConfig, micro_batch_of
from llama_dist.layout import Layout
from llama_dist.model.cuts import logical_shapes, slice_of
from llama_dist.model.stages import stage_layers
from llama_dist.pipeline.schedule import PipelineShape, program
from llama_dist.runtime import Groups

AXES = ("dp", "tp", "pp", "cp", "control")
AXIS_OF = {"dp": "dp", "tp": "tp", "kv": "tp", "cp": "cp", "tied": "pp", "channels": "pp"}  # by field of Groups

# By name of the operator: how many times (p - 1) / p of the bytes of which argument a rank sends.
VOLUMES = {
    "allreduce_": (2, 0), "broadcast_": (1, 0), "reduce_": (1, 0), "_allgather_base_": (1, 0), "allgather_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0), "reduce_scatter_": (1, 1), "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1), "alltoall_base_": (1, 1), "alltoall_": (1, 1),
}  # fmt: skip
SILENT = {"recv_", "recv_any_source_", "barrier"}


class Traffic(TorchDispatchMode):
    """Within it, adds up what this rank sends: `sent[axis]` in bytes. Slow: every operator goes through Python."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.sent = Counter(dict.fromkeys(AXES, 0))
        self._axes: dict[str, str] = {}
        for field in fields(groups):
            for group in _groups_within(getattr(groups, field.name)):
                self._axes.setdefault(group.group_name, AXIS_OF.get(field.name, "control"))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.split("::")[1]
        place = next((i for i, one in enumerate(func._schema.arguments) if one.name == "process_group"), None)
        group = None if place is None else dist.ProcessGroup.unbox(args[place])
        axis = "control" if group is None else self._axes.get(group.group_name, "control")
        self.sent[axis] += sent_bytes(name, args, ranks=1 if group is None else group.size())


def sent_bytes(name: str, args: Sequence[Any], *, ranks: int) -> float:
    """What each of `ranks` sends for the operator of this name. NotImplementedError for one that is not known."""
    if name in SILENT:
        return 0.0
    if name == "send":
        return float(_num_bytes(args[0]))
    if name not in VOLUMES:
        raise NotImplementedError(f"traffic.py does not know what {name} sends; give it a row in VOLUMES")
    times, argument = VOLUMES[name]
    return times * _share(ranks) * _num_bytes(args[argument])


def _groups_within(value: Any) -> Iterator[dist.ProcessGroup]:
    if isinstance(value, dist.ProcessGroup):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _groups_within(getattr(value, field.name))


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(one) for one in value)


class SavedActivations:
    """Within it, `peak`: the most bytes that autograd kept for backwards at one time, weights not counted.

    Memory that several saved tensors share counts once. What a checkpointed block computes again in its backward is
    not in it: that is one block's, and gone when its backward is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: Counter[int] = Counter()  # saved tensors by the address of their memory
        self._live = self.peak = 0
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if any(storage.data_ptr() == p.untyped_storage().data_ptr() for p in self._module.parameters()):
            return tensor
        return _Saved(self, tensor, storage.data_ptr(), storage.nbytes())

    def keep(self, address: int, size: int) -> None:
        self._held[address] += 1
        if self._held[address] == 1:
            self._live += size
            self.peak = max(self.peak, self._live)

    def drop(self, address: int, size: int) -> None:
        self._held[address] -= 1
        if self._held[address] == 0:
            self._live -= size


class _Saved:
    """A tensor that autograd keeps, for as long as autograd keeps it."""

    def __init__(self, book: SavedActivations, tensor: Tensor, address: int, size: int) -> None:
        self.tensor = tensor
        self._book, self._place = book, (address, size)
        book.keep(*self._place)

    def __del__(self) -> None:
        self._book.drop(*self._place)


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


@dataclass(frozen=True)
class OnPaper:
    """What theory says of one rank: see the text at the head of this file. Bytes."""

    sent: dict[str, float]
    state: float  # weights, gradients, float32 masters and moments


def on_paper(run: RunConfig, layout: Layout, rank: int, *, element: int) -> OnPaper:
    """Theory for `rank`; weights and activations have `element` bytes."""
    return _Paper(run, layout, rank, element).work_out()


class _Paper:
    def __init__(self, run: RunConfig, layout: Layout, rank: int, element: int) -> None:
        self.run, self.layout, self.element = run, layout, element
        self.coord = layout.coord(rank)
        parallel, model = run.parallel, run.model
        every = stage_layers(
            model, stages=layout.pp * parallel.virtual_stages, seq_len=run.data.seq_len, given=parallel.stage_layers
        )
        self.last_chunk = len(every) - 1
        self.chunks = range(self.coord.pp, len(every), layout.pp)
        self.layers = [layer for chunk in self.chunks for layer in every[chunk]]
        self.first, self.last = self.coord.pp == 0, self.coord.pp == layout.pp - 1
        self.micro_batch = micro_batch_of(run, layout)
        self.microbatches = run.train.global_batch // layout.dp // self.micro_batch
        self.positions = self.micro_batch * run.data.seq_len // layout.cp
        self.unit = self.positions * model.hidden_size * element
        mode = parallel.activation_checkpointing
        every_nth = {"none": 0, "selective": 0, "full": 1}.get(mode, mode)
        self.recomputed = sum(layer % every_nth == 0 for layer in self.layers) if every_nth else 0
        self.recomputed_attention = len(self.layers) if mode == "selective" else self.recomputed

    def work_out(self) -> OnPaper:
        sizes = [prod(self._slice(name).box.shape) for name in self._names()]
        sent = {"dp": self._dp(sizes), "tp": self._tp(), "pp": self._pp(), "cp": self._cp(), "control": 0.0}
        return OnPaper(sent, self._state(sum(sizes)))

    def _names(self) -> Iterator[str]:
        """Of the weights that the rank has a part of."""
        for name in logical_shapes(self.run.model):
            if name.startswith("model.layers."):
                here = int(name.split(".")[2]) in self.layers
            elif name == "model.embed_tokens.weight":
                here = self.first or (self.last and self.run.model.tie_word_embeddings)
            else:
                here = self.last
            if here:
                yield name

    def _slice(self, name: str) -> Any:
        return slice_of(name, self.run.model, tp=self.layout.tp, tp_rank=self.coord.tp)

    def _dp(self, sizes: list[int]) -> float:
        ranks, parallel = self.layout.dp * self.layout.cp, self.run.parallel
        all_gather = _share(ranks) * self.element
        reduction = self.element if self.run.train.reduce_precision == "auto" else 4
        reduce_scatter = _share(ranks) * reduction
        total = sum(sizes)
        if parallel.zero < 3:
            times = 1 if parallel.zero == 1 else self.microbatches
            return total * (2 * times * reduce_scatter + all_gather)
        kept = total if parallel.gather == "step" else sum(size for size in sizes if size <= self.run.model.hidden_size)
        gathers = kept + 2 * self.microbatches * (total - kept)
        return self.microbatches * total * reduce_scatter + gathers * all_gather

    def _tp(self) -> float:
        tp, model, layers = self.layout.tp, self.run.model, len(self.layers)
        sequence = self.run.parallel.sequence_parallel
        all_reduces = 4 * layers + self.first + self.last + self.recomputed * (1.5 if sequence else 1)
        sent = 2 * _share(tp) * (all_reduces * self.unit + self.last * 3 * 4 * self.positions)
        if sequence:
            sent += 2 * _share(tp) * (2 * layers + self.last) * model.hidden_size * self.element
        copies = max(tp // model.num_key_value_heads, 1)
        sent += 2 * _share(copies) * 2 * layers * self.positions * model.head_dim * self.element
        return self.microbatches * sent

    def _pp(self) -> float:
        layout, parallel, model = self.layout, self.run.parallel, self.run.model
        shape = PipelineShape(layout.pp, self.microbatches, parallel.virtual_stages)
        actions = program(parallel.schedule, shape)[self.coord.pp]
        message = self.unit / (layout.tp if parallel.sequence_parallel else 1)
        sent = message * sum(action.kind in ("SEND_F", "SEND_B") for action in actions)
        if model.tie_word_embeddings and layout.pp > 1 and (self.first or self.last):
            sent += model.vocab_size * model.hidden_size / layout.tp / (layout.dp * layout.cp) * 4
        return sent

    def _cp(self) -> float:
        cp, tp, model = self.layout.cp, self.layout.tp, self.run.model
        queries = model.num_attention_heads // tp
        keys = max(model.num_key_value_heads // tp, 1, cp)
        heads = (2 * queries + 2 * keys) * (2 * len(self.layers) + self.recomputed_attention)
        return self.microbatches * _share(cp) * heads * model.head_dim * self.positions * self.element

    def _state(self, parameters: int) -> float:
        ranks, gradient = self.layout.dp * self.layout.cp, 4
        whole = {1: self.element + gradient, 2: self.element, 3: 0}[self.run.parallel.zero]
        shared = self.element + gradient + 12 - whole
        return parameters * (whole + shared / ranks)


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
