"""Which rank's file holds which element of the training state: a function of the layout, so that nobody collects it.

Every rank writes one file: of each state in turn (weights, then each moment), its flat range of each parameter's
slice, in the order of the stage. From the layout in the manifest any reader knows where every element lies. What
DeepSpeed really gave a rank is held to this when the rank starts (`check_shares`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from llama_dist.boxes import Box, boxes_of_flat_range
from llama_dist.config import ModelConfig
from llama_dist.layout import Coord, Layout, consecutive
from llama_dist.model.cuts import MOMENTS, Slice, logical_shapes, slice_of

STATES = ("", *MOMENTS)  # in the order of a file; the weights first, which are often all that is read
ITEM = 4  # bytes: all states are float32
ALIGNMENT = 2  # elements: ZeRO-1 and 2 pad a group to a multiple of this on every rank
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def state_name(state: str, name: str) -> str:
    """The logical name of a state of the parameter `name`: itself, or of a moment `optimizer.exp_avg.NAME`."""
    return f"optimizer.{state}.{name}" if state else name


def split_name(tensor: str) -> tuple[str, str]:
    """The state and the parameter of a logical name."""
    if not tensor.startswith("optimizer."):
        return "", tensor
    _, state, name = tensor.split(".", 2)
    return state, name


def file_name(rank: int) -> str:
    """What a rank's file is called."""
    return f"rank-{rank:05d}.bin"


@dataclass(frozen=True)
class Held:
    """Elements [start, stop) of a parameter's slice, row-major: what one rank holds of it."""

    name: str
    slice_: Slice
    start: int
    stop: int

    @property
    def boxes(self) -> list[Box]:
        """The same in the logical tensor, in the order in which they follow each other."""
        within = boxes_of_flat_range(self.slice_.box.shape, self.start, self.stop)
        return [box.shifted(self.slice_.box.offset) for box in within]


@dataclass(frozen=True)
class Stored:
    """Box `box` of a logical tensor lies in the file of `rank`, row-major, from byte `start`."""

    box: Box
    rank: int
    start: int


@dataclass(frozen=True, eq=False)  # kept tables are found by identity
class SavedLayout:
    """How the state of `model` is spread over the files of a checkpoint.

    `layers`: the decoder layers of every chunk of the model, in order; chunk c belongs to pipeline rank c % pp.
    `states`: the weights, and the moments unless they were never there (weights that were imported).
    """

    model: ModelConfig
    layout: Layout
    zero: int
    layers: tuple[range, ...]
    states: tuple[str, ...] = STATES

    def to_json(self) -> dict[str, Any]:
        """All but the model."""
        axes = {axis: getattr(self.layout, axis) for axis in ("dp", "tp", "pp", "cp")}
        return axes | {
            "zero": self.zero,
            "layers": [len(layers) for layers in self.layers],
            "states": list(self.states),
        }

    @classmethod
    def from_json(cls, model: ModelConfig, values: Mapping[str, Any]) -> SavedLayout:
        """Raises ValueError where `values` are no layout of this model."""
        try:
            layout = Layout(*(_count(values[axis]) for axis in ("dp", "tp", "pp", "cp")))
            layers = tuple(consecutive([_count(number) for number in values["layers"]]))
            zero, states = _count(values["zero"]), tuple(values["states"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{values} is no layout of a model: {error!r}") from error
        fits = sum(map(len, layers)) == model.num_hidden_layers and len(layers) % layout.pp == 0
        if not fits or not _can_cut(model, layout.tp) or zero > 3 or states not in (STATES, STATES[:1]):
            raise ValueError(f"{values} is no layout of a model of {model.num_hidden_layers} layers")
        return cls(model, layout, zero, layers, states)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and unsharded shape."""
        return logical_shapes(self.model)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every logical tensor's name and shape, weights first."""
        for state in self.states:
            yield from ((state_name(state, name), shape) for name, shape in self.shapes.items())

    @property
    def parts(self) -> int:
        """Over how many ranks ZeRO partitions a slice."""
        return self.layout.dp * self.layout.cp

    def held(self, rank: int) -> list[Held]:
        """What a rank holds of each parameter, in the order of its stage; those of which it holds nothing left out."""
        coord = self.layout.coord(rank)
        part = coord.dp * self.layout.cp + coord.cp
        held = []
        for name, placed in self._placed(coord.pp, coord.tp).items():
            start, stop = placed.range_of(part)
            if start < stop:
                held.append(Held(name, placed.slice_, start, stop))
        return held

    def file_size(self, rank: int) -> int:
        """Bytes of a rank's file."""
        return len(self.states) * ITEM * sum(held.stop - held.start for held in self.held(rank) if held.slice_.owner)

    def stored(self, tensor: str, box: Box) -> list[Stored]:
        """All stored boxes of a logical tensor that have elements of `box`. Raises KeyError for one it has not."""
        state, name = split_name(tensor)
        if name not in self.shapes or state not in self.states:
            raise KeyError(tensor)
        found: list[Stored] = []
        stage = self._stage_of(name)
        for tp in range(self.layout.tp):
            placed = self._placed(stage, tp)[name]
            within = _common(box, placed.slice_.box)
            if not placed.slice_.owner or within is None:
                continue
            width = prod(placed.slice_.box.shape[1:])
            # In rows of the slice: a box that takes only some of its columns may list ranges it has nothing of.
            rows = within.offset[0] - placed.slice_.box.offset[0]
            for part in placed.parts_of(rows * width, (rows + within.shape[0]) * width):
                found += [s for s in self._stored_of(stage, tp, part, state, name) if _common(s.box, box)]
        return found

    def _stored_of(self, stage: int, tp: int, part: int, state: str, name: str) -> Iterator[Stored]:
        dp, cp = divmod(part, self.layout.cp)
        rank = self.layout.rank(Coord(dp=dp, tp=tp, pp=stage, cp=cp))
        before, total = self._places(rank)
        placed = self._placed(stage, tp)[name]
        start = ITEM * (self.states.index(state) * total + before[name])
        for box in Held(name, placed.slice_, *placed.range_of(part)).boxes:
            yield Stored(box, rank, start)
            start += ITEM * box.numel

    @lru_cache(maxsize=4096)  # noqa: B019 (a layout lives as long as the run)
    def _places(self, rank: int) -> tuple[dict[str, int], int]:
        """Of each parameter in a rank's file, the elements before it in the part of one state; and those of that part."""
        before, total = {}, 0
        for held in self.held(rank):
            if held.slice_.owner:
                before[held.name] = total
                total += held.stop - held.start
        return before, total

    def _names(self, stage: int) -> list[str]:
        """The parameters of a stage in the order of its modules."""
        names: dict[str, None] = {}
        last = len(self.layers) - 1
        by_layer: dict[str, list[str]] = self._names_by_layer
        for chunk in range(stage, len(self.layers), self.layout.pp):
            tied_head = chunk == last and self.model.tie_word_embeddings
            if chunk == 0 or tied_head:
                names[_EMBEDDING] = None
            for number in self.layers[chunk]:
                names |= dict.fromkeys(by_layer[str(number)])
            if chunk == last:
                names[_NORM] = None
                if not tied_head:
                    names[_HEAD] = None
        return list(names)

    @cached_property
    def _names_by_layer(self) -> dict[str, list[str]]:
        by_layer: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.startswith("model.layers."):
                by_layer.setdefault(name.split(".")[2], []).append(name)
        return by_layer

    @cached_property
    def _stages(self) -> dict[str, int]:
        """The stage that saves each parameter: of a tied embedding the first."""
        stages: dict[str, int] = {}
        for stage in range(self.layout.pp):
            for name in self._names(stage):
                stages.setdefault(name, stage)
        return stages

    def _stage_of(self, name: str) -> int:
        return self._stages[name]

    @lru_cache(maxsize=1024)  # noqa: B019
    def _placed(self, stage: int, tp: int) -> dict[str, _Placed]:
        """How the slices of one stage and tensor-parallel rank are partitioned."""
        slices = {}
        for name in self._names(stage):
            slice_ = slice_of(name, self.model, tp=self.layout.tp, tp_rank=tp)
            owner = slice_.owner and self._stage_of(name) == stage
            slices[name] = Slice(slice_.box, slice_.shape, owner, slice_.copies)
        if self.zero == 3:  # every parameter by itself
            return {name: _Placed(s, 0, -(-s.box.numel // self.parts)) for name, s in slices.items()}
        placed: dict[str, _Placed] = {}
        for group in self._groups(stage, slices):
            total = sum(slices[name].box.numel for name in group)
            padded = -(-total // (ALIGNMENT * self.parts)) * ALIGNMENT
            at = 0
            for name in group:
                placed[name] = _Placed(slices[name], at, padded)
                at += slices[name].box.numel
        return {name: placed[name] for name in slices}

    def _groups(self, stage: int, slices: Mapping[str, Slice]) -> list[list[str]]:
        """The optimizer's parameter groups, which ZeRO-1 and 2 concatenate: see `pipeline.engine.build_optimizer`."""
        matrices = [name for name, slice_ in slices.items() if len(slice_.shape) > 1]
        alone, ends = None, {0, self.layout.pp - 1}
        if self.model.tie_word_embeddings and len(ends) == 2:
            alone = _EMBEDDING if stage in ends else matrices[0]
        norms = [name for name in slices if name not in matrices]
        return [[name for name in matrices if name != alone], norms, [alone] if alone else []]


@dataclass(frozen=True)
class _Placed:
    """A slice that begins at element `at` of a sequence cut into parts of `size` elements."""

    slice_: Slice
    at: int
    size: int

    def range_of(self, part: int) -> tuple[int, int]:
        """The elements of the slice that a part holds."""
        numel = self.slice_.box.numel
        return tuple(min(max(edge - self.at, 0), numel) for edge in (part * self.size, (part + 1) * self.size))

    def parts_of(self, start: int, stop: int) -> range:
        """The parts that hold elements [start, stop) of the slice."""
        return range((self.at + start) // self.size, (self.at + stop - 1) // self.size + 1)


def _count(value: Any) -> int:
    """What JSON has as a whole number from 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value


def _can_cut(model: ModelConfig, tp: int) -> bool:
    """Whether `slice_of` can cut every parameter for `tp` ranks."""
    keys = model.num_key_value_heads
    whole = (model.vocab_size, model.num_attention_heads, model.intermediate_size)
    return not any(size % tp for size in whole) and (keys % tp == 0 or tp % keys == 0)


def _common(a: Box, b: Box) -> Box | None:
    """The box of the elements of both, or None."""
    offset = tuple(map(max, a.offset, b.offset))
    ends = (min(ao + as_, bo + bs) for ao, as_, bo, bs in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return Box(offset, shape) if min(shape) > 0 else None
