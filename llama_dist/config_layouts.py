"""Which layouts a model and a batch fit, and the nearest that do where one does not.

Settings are taken by their dotted names, so that a layout is judged by the same checks before and after it is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llama_dist.config_numbers import Check, choice, divisors, either_side
from llama_dist.layout import Layout

MAX_STAGES = 64  # how far to look for a number of stages, where no world size bounds it
MAX_STEPS = 64  # how far to look for another world size, where no layout of the given one fits


def micro_batch_size(share: int, *, at_most: int, count_multiple: int) -> int:
    """The largest micro-batch up to `at_most` that cuts a replica's share into a multiple of `count_multiple`."""
    assert share % count_multiple == 0, f"{share} sequences make no multiple of {count_multiple} micro-batches"
    return max(size for size in divisors(share // count_multiple) if size <= at_most)


def count_multiple(schedule: str, pp: int) -> int:
    """What the number of micro-batches must be a multiple of: interleaved takes them through the chunks pp by pp."""
    return pp if schedule == "interleaved" else 1


def batch_problem(global_batch: int, dp: int, *, pp: int, schedule: str, replica: int | None = None) -> str | None:
    """What is wrong with a global batch (in sequences) that `dp` replicas share.

    `replica` is the number of ranks in a replica, where the world size decides dp and not the config.
    """
    multiple = count_multiple(schedule, pp)
    if global_batch % (dp * multiple) == 0:
        return None
    fit = sharing_dps(global_batch, pp=pp, schedule=schedule)
    ways = [f"train.global_batch={either_side(global_batch, dp * multiple)}"]
    if fit and replica is None:
        ways.append(f"parallel.dp in {choice(fit, dp)}")
    elif fit and replica is not None:
        ways.append(f"a world size in {choice([replica * n for n in fit], replica * dp)}")
    if global_batch % dp == 0:
        ways.append("parallel.schedule=1f1b and virtual_stages=1")  # which has nothing against this share
    share = f"{global_batch // dp} sequences for each replica (train.global_batch={global_batch} / dp={dp}) make none"
    none = f"train.global_batch={global_batch} makes none, however many replicas share it"
    problem = (
        f"train.global_batch={global_batch} does not split evenly over {dp} replicas"
        if global_batch % dp
        else f"parallel.schedule={schedule} needs micro-batches in a multiple of parallel.pp={pp}, and "
        f"{share if fit else none}"
    )
    return f"{problem}; use {', or '.join(ways)}"


def sharing_dps(global_batch: int, *, pp: int, schedule: str) -> list[int]:
    """The numbers of replicas that can share a global batch; ascending."""
    multiple = count_multiple(schedule, pp)
    return [dp for dp in divisors(global_batch) if global_batch % (dp * multiple) == 0]


def start_text(world: int, *, replica: int, dps: Sequence[int]) -> str:
    """How many ranks to start instead of `world`: the numbers next to it that make `dps` replicas."""
    below = [replica * dp for dp in dps if replica * dp < world][-1:]
    above = [replica * dp for dp in dps if replica * dp > world][:1]
    return f"; start {' or '.join(map(str, below + above))} ranks" if below + above else ""


def _tensor_parallel(tp: int, kv_heads: int, heads: int, vocab: int, intermediate: int) -> Iterator[str]:
    sizes = {"num_attention_heads": heads, "vocab_size": vocab, "intermediate_size": intermediate}
    fit = [n for n in divisors(math.gcd(*sizes.values())) if _shares_kv(n, kv_heads)]
    for name, size in sizes.items():
        if size % tp:
            yield f"parallel.tp={tp} does not divide model.{name}={size}; use tp in {choice(fit, tp)}"
    if not _shares_kv(tp, kv_heads):
        yield (
            f"parallel.tp={tp} neither divides model.num_key_value_heads={kv_heads} nor is a multiple of it; "
            f"use tp in {choice(fit, tp)}"
        )


def _shares_kv(parts: int, kv_heads: int) -> bool:
    """Whether each part gets whole key/value heads, or each head goes to as many parts."""
    return kv_heads % parts == 0 or parts % kv_heads == 0


def _context_parallel(cp: int, tp: int, kv_heads: int, heads: int) -> Iterator[str]:
    local_heads, local_kv = heads // tp, max(kv_heads // tp, 1)
    if heads % tp or not _shares_kv(tp, kv_heads):
        return  # said already, and then there is no number of heads on a rank
    fit = choice([n for n in divisors(local_heads) if _shares_kv(n, local_kv)], cp)
    if local_heads % cp:
        yield (
            f"parallel.cp={cp} does not divide the {local_heads} query heads of a rank "
            f"(model.num_attention_heads={heads}, parallel.tp={tp}); use cp in {fit}"
        )
    elif not _shares_kv(cp, local_kv):
        yield (
            f"parallel.cp={cp} neither divides the {local_kv} key/value heads of a rank "
            f"(model.num_key_value_heads={kv_heads}, parallel.tp={tp}) nor is a multiple of it; use cp in {fit}"
        )


def _sequence(seq_len: int, cp: int, tp: int, sequence_parallel: bool) -> Iterator[str]:
    parts = cp * (tp if sequence_parallel else 1)
    if seq_len % parts:
        why = f"parallel.cp * parallel.tp = {cp} * {tp} = {parts}" if sequence_parallel else f"parallel.cp={cp}"
        without = ", or parallel.sequence_parallel=false" if sequence_parallel and seq_len % cp == 0 else ""
        yield (
            f"data.seq_len={seq_len} does not split over {why} ranks; "
            f"use data.seq_len={either_side(seq_len, parts)}{without}"
        )


def _stages(pp: int, virtual: int, layers: int) -> Iterator[str]:
    if pp * virtual > layers:
        chunks = f"parallel.pp * parallel.virtual_stages = {pp} * {virtual} = {pp * virtual} chunks of a layer or more exceed"
        what = chunks if virtual > 1 else f"parallel.pp={pp} exceeds"
        ways = [f"pp <= {layers // virtual}"] * (virtual <= layers)
        if layers // pp > 1:
            ways.append(f"virtual_stages <= {layers // pp}")
        elif virtual > 1:
            ways.append(f"pp={min(pp, layers)} and virtual_stages=1 and schedule=1f1b")
        yield f"{what} model.num_hidden_layers={layers}; use {', or '.join(ways)}"


def _virtual_stages(virtual: int, schedule: str, pp: int, layers: int) -> Iterator[str]:
    if virtual > 1 and schedule != "interleaved":
        other = ", or schedule=interleaved" if pp * virtual <= layers else ""
        yield (
            f"parallel.virtual_stages={virtual} is for parallel.schedule=interleaved, and it is {schedule}; "
            f"use virtual_stages=1{other}"
        )
    if virtual == 1 and schedule == "interleaved":
        few = f", and model.num_hidden_layers={layers} is fewer than the {pp * 2} chunks of parallel.pp={pp} times 2"
        if pp * 2 <= layers:
            way = "for example virtual_stages=2, or schedule=1f1b"
        else:
            way = "schedule=1f1b" + f", or pp <= {layers // 2} and virtual_stages=2" * (layers >= 2)
        yield (
            "parallel.schedule=interleaved needs parallel.virtual_stages of 2 or more (it is 1f1b over those)"
            f"{few * (pp * 2 > layers)}; use {way}"
        )


def _stage_layers(given: Sequence[int] | None, pp: int, virtual: int, layers: int) -> Iterator[str]:
    chunks = pp * virtual
    if given is None or chunks > layers:
        return  # said already, and then no list would do
    shown, way = f"parallel.stage_layers={list(given)}", "stage_layers=null to split by cost"
    if chunks <= MAX_STAGES:
        even, rest = divmod(layers, chunks)
        way = f"for example stage_layers={[even + 1] * rest + [even] * (chunks - rest)}, or {way}"
    if len(given) != chunks:
        yield (
            f"{shown} has {len(given)} entries for parallel.pp * parallel.virtual_stages = {pp} * {virtual} = "
            f"{chunks} chunks; use {way}"
        )
    elif sum(given) != layers:
        yield f"{shown} adds up to {sum(given)} layers, and model.num_hidden_layers={layers}; use {way}"


def _batch(global_batch: int, dp: int | str, pp: int, schedule: str) -> Iterator[str]:
    # What a single replica cannot take, no number of them could share: with dp=auto, no world size would do.
    if problem := batch_problem(global_batch, 1 if dp == "auto" else int(dp), pp=pp, schedule=schedule):
        yield problem


def _parallel(*names: str) -> tuple[str, ...]:
    return tuple(f"parallel.{name}" for name in names)


KV_HEADS, HEADS, LAYERS = "model.num_key_value_heads", "model.num_attention_heads", "model.num_hidden_layers"
LAYOUT_CHECKS: tuple[Check, ...] = (
    Check(("parallel.tp", KV_HEADS, HEADS, "model.vocab_size", "model.intermediate_size"), _tensor_parallel),
    Check((*_parallel("cp", "tp"), KV_HEADS, HEADS), _context_parallel),
    Check(("data.seq_len", *_parallel("cp", "tp", "sequence_parallel")), _sequence),
    Check((*_parallel("pp", "virtual_stages"), LAYERS), _stages),
    Check((*_parallel("virtual_stages", "schedule", "pp"), LAYERS), _virtual_stages),
    Check((*_parallel("stage_layers", "pp", "virtual_stages"), LAYERS), _stage_layers),
    Check(("train.global_batch", *_parallel("dp", "pp", "schedule")), _batch),
)
LAYOUT_SETTINGS = frozenset(name for check in LAYOUT_CHECKS for name in check.settings)


def some_layout_fits(known: Mapping[str, Any]) -> bool:
    """Whether axes alone could mend the settings; `known` holds all of LAYOUT_SETTINGS."""
    # One replica of whole heads and sequences fits wherever any layout does, once it has the right number of stages.
    return any(_fits(known, Layout(1, pp=pp)) for pp in {1, _listed_stages(known)})


def nearest_layouts(known: Mapping[str, Any], world: int, *, at_most: int = 3) -> list[Layout]:
    """Layouts of `world` ranks that fit the model, the batch and the rest of the settings, the nearest first.

    Near is what multiplies and divides the given tp, pp and cp (and dp, where it is given) by little. `known` holds
    all of LAYOUT_SETTINGS.
    """
    fitting = [layout for layout in _candidates(known, world) if _fits(known, layout)]
    return sorted(fitting, key=lambda layout: _distance(known, layout))[:at_most]


def nearest_replicas(known: Mapping[str, Any], *, at_most: int = 3) -> list[Layout]:
    """As nearest_layouts, where dp and so the world size are open: replicas of any size, each as a layout of dp=1."""
    most = max(known[LAYERS] // known["parallel.virtual_stages"], 1)
    stages = {*range(1, min(most, MAX_STAGES) + 1), min(known["parallel.pp"], most), _listed_stages(known)}
    every = (Layout(1, tp, pp, cp) for tp, cp in _cuts_of_heads(known) for pp in stages)
    fitting = [layout for layout in every if _fits(known, layout, dp="auto")]
    return sorted(fitting, key=lambda layout: _distance(known, layout))[:at_most]


def nearest_text(known: Mapping[str, Any], world: int | None) -> str:
    """The end of a message about a layout: the nearest that fit. Without a world size, where dp is auto: replicas.

    For settings which some layout fits.
    """
    if world is None:
        near = ", ".join(f"tp={one.tp} pp={one.pp} cp={one.cp}" for one in nearest_replicas(known))
        return f"replicas that fit: {near}"
    ranks = f"{world} rank" + "s" * (world > 1)
    if near := ", ".join(map(str, nearest_layouts(known, world))):
        return f"layouts of {ranks} that fit: {near}"
    other = (size for step in range(1, MAX_STEPS + 1) for size in (world - step, world + step) if size > 0)
    found = (layout for size in other for layout in nearest_layouts(known, size, at_most=1))
    near = ", ".join(f"{layout} ({layout.world})" for layout in islice(found, 3))
    return f"no layout of {ranks} fits these settings" + f"; of other sizes: {near}" * bool(near)


def _fits(known: Mapping[str, Any], layout: Layout, *, dp: int | str | None = None) -> bool:
    """Whether the settings, all but their axes, go with this layout."""
    settings = {**known, **{f"parallel.{axis}": getattr(layout, axis) for axis in ("dp", "tp", "pp", "cp")}}
    settings["parallel.dp"] = dp or layout.dp
    return not any(
        True for check in LAYOUT_CHECKS for _ in check.problems(*(settings[name] for name in check.settings))
    )


def _listed_stages(known: Mapping[str, Any]) -> int:
    """The pp for which a given parallel.stage_layers has an entry a chunk; 1 where it is not given."""
    return max(len(known["parallel.stage_layers"] or []) // known["parallel.virtual_stages"], 1)


def _candidates(known: Mapping[str, Any], world: int) -> Iterator[Layout]:
    """The layouts of `world` ranks whose tp and cp share the heads out and whose dp shares the batch out."""
    for tp, cp in _cuts_of_heads(known, world):
        left = world // (tp * cp)
        for dp in divisors(math.gcd(left, known["train.global_batch"])):
            yield Layout(dp, tp, left // dp, cp)


def _cuts_of_heads(known: Mapping[str, Any], ranks: int = 0) -> Iterator[tuple[int, int]]:
    """(tp, cp) that may fit, whose product divides `ranks` (0: any), cut down to few by what is cheap to say."""
    sizes = math.gcd(known["model.vocab_size"], known["model.intermediate_size"])
    for tp in divisors(math.gcd(ranks, known[HEADS], sizes)):
        for cp in divisors(math.gcd(ranks // tp, known[HEADS] // tp, known["data.seq_len"])):
            yield tp, cp


def _distance(known: Mapping[str, Any], layout: Layout) -> tuple[float, ...]:
    axes = [axis for axis in ("tp", "pp", "cp", "dp") if known[f"parallel.{axis}"] != "auto"]
    factors = [abs(math.log2(getattr(layout, axis) / known[f"parallel.{axis}"])) for axis in axes]
    # Of those equally near, the one that leaves most axes as they are, and then the one with fewest cuts of the model.
    return (round(sum(factors), 9), sum(factor > 0 for factor in factors), layout.cp, layout.pp, layout.tp)
