"""One YAML file -> one frozen, typed tree that describes a whole run.

A new setting is one field with its doc under it; what must hold between settings is in
`config_checks.py` and beside the data's own settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from llama_dist.config_data import DataConfig
from llama_dist.config_layouts import (
    batch_problem,
    count_multiple,
    micro_batch_size,
    nearest_text,
    sharing_dps,
    start_text,
)
from llama_dist.config_problems import conflicts_within, find_problems, settings_of
from llama_dist.config_section import (
    Beta,
    Count,
    CountOrZero,
    Flag,
    Positive,
    PositiveOrZero,
    Ratio,
    Section,
    Seed,
    Text,
    UpToABillion,
)
from llama_dist.config_yaml import Document, dump_yaml, graft_, override_, read_document
from llama_dist.errors import UserError
from llama_dist.layout import Layout


class RopeScaling(Section):
    """How Llama 3.1 stretches the rotary embeddings (The Llama 3 Herd of Models, section 3.2)."""

    factor: Annotated[float, Field(strict=True, ge=1)]
    """By how much low frequencies are slowed."""
    low_freq_factor: Positive
    """Wavelengths above original_max_position_embeddings / low_freq_factor are slowed by the whole factor."""
    high_freq_factor: Positive
    """Wavelengths below original_max_position_embeddings / high_freq_factor are kept; in between is a blend."""
    original_max_position_embeddings: Count
    """Context in tokens that the model had before the stretch."""


class ModelConfig(Section):
    """The shape of a LLaMA, under the names that Hugging Face uses."""

    vocab_size: Count
    """Rows of the embedding and of the head; the tokenizer has at most as many tokens."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width inside the SwiGLU feed-forward."""
    num_hidden_layers: Count
    """Decoder layers."""
    num_attention_heads: Count
    """Query heads."""
    num_key_value_heads: Count = Field(default_factory=lambda known: known["num_attention_heads"])
    """Key/value heads, each shared by an equal group of query heads; default: as many as query heads."""
    head_dim: Count = Field(default_factory=lambda known: known["hidden_size"] // known["num_attention_heads"])
    """Width of a head; default: hidden_size // num_attention_heads."""
    max_position_embeddings: Count
    """Longest sequence in tokens."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's stretch of the rotary embeddings; null: none."""
    rms_norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: Flag = False
    """Whether the head is the embedding's own weight."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        return _without_conflicts(self)


class ParallelConfig(Section):
    """How the run is laid out; none of it changes what is computed."""

    dp: Count | Literal["auto"] = "auto"
    """Replicas of the model, over which ZeRO partitions; auto: as many as the world size allows."""
    tp: Count = 1
    """Tensor-parallel ranks in a replica; each holds a cut of every matrix."""
    pp: Count = 1
    """Pipeline ranks in a replica; each holds some of the layers."""
    cp: Count = 1
    """Context-parallel ranks in a replica; each holds a part of every sequence. ZeRO partitions over dp * cp ranks."""
    zero: Annotated[int, Field(strict=True, ge=1, le=3)] = 3
    """What DeepSpeed ZeRO partitions: 1 optimizer state, 2 also gradients, 3 also parameters."""
    gather: Literal["microbatch", "step"] = "microbatch"
    """With ZeRO-3: gather parameters for every micro-batch (least memory), or keep them through a step (least
    communication). With pp > 1 gathering cannot run ahead of the computation on any stage but the last."""
    micro_batch: Count = 1
    """Sequences that a replica takes through the model at a time, at most: what bounds the memory of activations. The
    largest number up to this that divides the replica's share is used, and the rest of the share is accumulated; for
    schedule interleaved the number of micro-batches is a multiple of pp."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1"] = "1f1b"
    """Order of forwards and backwards in the pipeline: one forward one backward, all forwards first, 1f1b over
    virtual stages (a smaller bubble for more messages), or zero bubble H1 (the gradients of weights fill the bubble; what
    they are made of is kept until then, which activation checkpointing does not save)."""
    virtual_stages: Count = 1
    """Chunks of the model on each pipeline rank, chunk c on rank c % pp; above 1 for schedule interleaved alone."""
    stage_layers: Annotated[list[Count], Field(min_length=1)] | None = None
    """Decoder layers of each of the pp * virtual_stages chunks, in model order; null: split by cost, head included."""
    sequence_parallel: Flag = False
    """Whether the tensor-parallel ranks also share the sequence out where they would repeat each other's work: less
    memory for the same communication. Does nothing with tp=1."""
    activation_checkpointing: Literal["none", "full", "selective"] | Annotated[int, Field(strict=True, ge=2)] = "none"
    """What is recomputed in the backward: no layer, every layer, the attention only, or every N-th layer."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: Positive
    """Peak learning rate."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end, as a share of the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled weight decay; matrices only, never norms."""
    grad_clip: PositiveOrZero = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine to the end, or stable and then a linear decay (wsd)."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from 0."""
    decay_steps: Count | None = None
    """Length of the final decay in steps, for wsd; null for cosine."""


class TrainConfig(Section):
    """How long, on what, and in which precision."""

    steps: Count
    """Optimizer updates in the whole run."""
    global_batch: UpToABillion
    """Sequences in an update, whatever the layout."""
    seed: Seed = 0
    """Decides the initial weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward and backward (master weights are float32); auto: bf16 on GPUs, fp32 on CPUs."""
    reduce_precision: Literal["auto", "fp32"] = "auto"
    """Of the reduction of gradients over the replicas; auto: as precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the machine has them."""
    timeout_seconds: UpToABillion = 600
    """How long a rank waits for the others before it gives up."""


class LocalConfig(Section):
    """Frequent saves to the disks of the nodes, from which a run goes on where no two neighbouring nodes were lost."""

    folder: Text
    """On each node's own disk; $NAMES and ${NAMES} of environment variables are filled in on each rank."""
    every: Count
    """Steps between these saves; where a save to shared storage is due, that one is made instead."""
    keep: Count = 1
    """How many of the newest stay."""
    neighbour: Flag = True
    """Whether the next node keeps a copy of a node's files."""


class CheckpointConfig(Section):
    """When the run saves itself."""

    every: CountOrZero = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""
    keep_every: CountOrZero = 0
    """Checkpoints at a multiple of so many steps stay for good; 0: none do."""
    best: Text | None = None
    """Metric by which the best evaluated checkpoint stays, such as heldout/loss; null: none does for that."""
    asynchronous: Flag = True
    """Whether training goes on while a checkpoint is written, at the cost of a copy of the state in host memory."""
    verify: Literal["full", "fast"] = "full"
    """What a resume checks first: every checksum, or only that all files are there in their sizes."""
    folder: Text | None = None
    """Where checkpoints are kept, a folder or a URL such as s3://bucket/run; null: checkpoints in the run's folder."""
    local: LocalConfig | None = None
    """More frequent saves to the nodes' own disks; null: none."""


class EvalConfig(Section):
    """What is measured during the run."""

    every: CountOrZero = 0
    """Steps between evaluations; 0: only at the end."""
    perplexity: Flag = True
    """Whether to measure perplexity on data.heldout, where that is given."""
    choices: list[Text] = []
    """Multiple-choice benchmarks: paths of .jsonl files."""
    batch: Count = 8
    """Sequences that a replica evaluates at a time."""
    max_samples: CountOrZero = 0
    """Samples of each benchmark; 0: all."""


class MetricsConfig(Section):
    """Where figures go."""

    tensorboard: Flag = True
    """Whether to write TensorBoard files into the run folder."""
    peak_tflops: Positive | None = None
    """Of one device, for the MFU; null: known for common GPUs, measured otherwise."""


class RunConfig(Section):
    """A whole pretraining run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the run is called."""
    folder: Text = Field(default_factory=lambda known: f"runs/{known['name']}")
    """Where it keeps everything it writes; default: runs/<name>."""
    model: ModelConfig
    """The model: a mapping, or the path of a file that holds one, relative to this file."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is laid out."""
    data: DataConfig
    """What the model reads."""
    optim: OptimConfig
    """AdamW and its learning rate."""
    train: TrainConfig
    """How long, on what, and in which precision."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves itself."""
    eval: EvalConfig = EvalConfig()
    """What is measured during the run."""
    metrics: MetricsConfig = MetricsConfig()
    """Where figures go."""

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        return _without_conflicts(self)


SectionT = TypeVar("SectionT", bound=Section)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with `section.key=value` overrides applied in order.

    `model` may name another file, relative to this one (an override `model=FILE`: to the working directory). Raises
    UserError with one line for each problem of the file, its model file and the overrides.
    """
    document = read_document(path)
    _read_model_(document, Path(document.source).parent)
    for text in overrides:
        if override_(document, text) == ("model",):
            _read_model_(document, Path())
    return _build(RunConfig, document)


def load_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The model that a YAML file of its own describes. Raises UserError with one line for each problem."""
    return _build(ModelConfig, read_document(path))


def build_config(tree: type[SectionT], values: Mapping[str, Any], *, where: str) -> SectionT:
    """Settings from plain values. Raises UserError with one line for each problem, each beginning with `where`."""
    return _build(tree, Document(where, dict(values)))


def dump_config(run: RunConfig) -> str:
    """YAML that loads to an equal RunConfig, with every default written out."""
    return dump_yaml(run.model_dump(mode="json"))


def fit_layout(run: RunConfig, world_size: int) -> Layout:
    """The run's layout on `world_size` ranks. Raises UserError naming the nearest that would fit."""
    parallel, batch = run.parallel, run.train.global_batch
    replica = parallel.tp * parallel.pp * parallel.cp
    product = f"{parallel.tp} * {parallel.pp} * {parallel.cp}"
    dp = world_size // replica if parallel.dp == "auto" else parallel.dp
    if dp * replica == world_size:
        problem = batch_problem(batch, dp, pp=parallel.pp, schedule=parallel.schedule, replica=replica)
    elif parallel.dp == "auto":
        dps = sharing_dps(batch, pp=parallel.pp, schedule=parallel.schedule)
        problem = (
            f"the world size {world_size} is not a multiple of parallel.tp * parallel.pp * parallel.cp = "
            f"{product} = {replica}{start_text(world_size, replica=replica, dps=dps)}"
        )
    else:
        problem = (
            f"the world size {world_size} is not parallel.dp * parallel.tp * parallel.pp * parallel.cp = "
            f"{dp} * {product} = {dp * replica}; start {dp * replica} ranks"
        )
    if problem:
        raise UserError(f"run {run.name}: {problem}; {nearest_text(settings_of(run), world_size)}")
    return Layout(dp, parallel.tp, parallel.pp, parallel.cp)


def micro_batch_of(run: RunConfig, layout: Layout) -> int:
    """Sequences in a micro-batch on this layout: the largest number up to the setting that cuts a replica's share well.

    That is into equal micro-batches, and for the interleaved schedule into a multiple of pp of them.
    """
    share, rest = divmod(run.train.global_batch, layout.dp)
    assert rest == 0, f"{layout} does not share out a global batch of {run.train.global_batch}; use fit_layout"
    multiple = count_multiple(run.parallel.schedule, layout.pp)
    return micro_batch_size(share, at_most=run.parallel.micro_batch, count_multiple=multiple)


def _read_model_(document: Document, folder: Path) -> None:
    """Where `model` is the name of a file, put that file's settings in its place."""
    name = document.values.get("model")
    if isinstance(name, str):
        try:
            graft_(document, ("model",), read_document(folder / name))
        except UserError as error:
            document.problems.append(f"{document.place(('model',))}: model={name!r}: {error}")
            document.unread.add(("model",))


def _build(tree: type[SectionT], document: Document) -> SectionT:
    problems = [
        f"{document.place(problem.keys)}: {problem.text}"
        for problem in find_problems(RunConfig, tree, document.values)
        if problem.keys[:1] not in document.unread
    ]
    if document.problems or problems:
        raise UserError("\n".join(dict.fromkeys([*document.problems, *problems])))
    return tree.model_validate(document.values)


def _without_conflicts(section: SectionT) -> SectionT:
    conflicts = conflicts_within(RunConfig, section)
    if conflicts:
        raise ValueError("\n".join(conflicts))
    return section
