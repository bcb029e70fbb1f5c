"""What others make of the same text and the same tokens: one peer a process, for benchmarks/data.py.

    PYTHON benchmarks/data_peers.py NAME '{"its": "arguments"}'

Prints a line of JSON: what was measured, or {"missing": MODULE} where PYTHON does not have the peer. Nothing of the
project is imported, so that PYTHON may be of an environment of the peers' own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

# Each process of a contender is one thread: the libraries would start one for each core.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
Answer = dict[str, Any]
TOGETHER = 8  # samples that are loaded at a time, where that is faster


def answer(contenders: dict[str, Callable[..., Answer | None]]) -> None:
    """Do what the command line asks for, and end the process at once: some libraries leave threads behind."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    try:
        found = contenders[name](**arguments) or {}
    except ImportError as error:
        found = {"missing": error.name or str(error)}
    print(json.dumps(found), flush=True)
    os._exit(0)


def stopwatch() -> Callable[[], Answer]:
    """A function that tells the time since now: `seconds`, and `cpu` of this process and those that it waited for."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    began, before = time.perf_counter(), cpu()
    return lambda: {"seconds": time.perf_counter() - began, "cpu": cpu() - before}


def measure_loader(open_: Callable[[], Iterator[int]], seconds: float) -> Answer:
    """Call `open_` and take what it yields, numbers of tokens that were loaded, for so many seconds.

    `startup` is until the first yield, in seconds; `rate` in tokens a second from there on, and `cpu_rate` in tokens a
    second of the processor; `memory` the most that was resident, pages of mapped files included, above what it was
    before: bytes.
    """
    before = watch_memory()
    began = time.perf_counter()
    loading = open_()
    next(loading)
    startup = time.perf_counter() - began
    watch, began = stopwatch(), time.perf_counter()
    tokens = 0
    for count in loading:
        tokens += count
        if time.perf_counter() - began > seconds:
            break
    taken = watch()
    return {
        "startup": startup, "rate": tokens / taken["seconds"], "cpu_rate": tokens / taken["cpu"],
        "memory": peak_memory() - before,
    }  # fmt: skip


def watch_memory() -> int:
    """Let the peak begin here; returns what is resident, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def lines_of(inputs: list[str]) -> Iterator[str]:
    return chain.from_iterable(open(file, encoding="utf-8") for file in inputs)


# Text to tokens.


def raw(*, inputs: list[str], tokenizer: str) -> Answer:
    """sentencepiece alone: the texts are in memory, and the ids go nowhere."""
    texts = [json.loads(line)["text"] for line in lines_of(inputs)]
    encode = sentencepiece.SentencePieceProcessor(model_file=tokenizer).encode
    watch = stopwatch()
    tokens = sum(len(encode(text)) for text in texts)
    return watch() | {"tokens": tokens + 2 * len(texts)}


class Encoder:
    """Of Megatron-LM's tools/preprocess_data.py, which megatron-core lacks: `encode` in the processes of a pool."""

    tokenizer: Any

    def __init__(self, path: str, keys: tuple[str, ...] = ("text",)) -> None:
        self.path, self.keys = path, keys

    def build(self) -> Any:
        from megatron.core.tokenizers import MegatronTokenizer

        return MegatronTokenizer.from_pretrained(self.path, {"library": "sentencepiece"})

    def initializer(self) -> None:
        Encoder.tokenizer = self.build()

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        data = json.loads(line)
        ids, lengths = {}, {}
        for key in self.keys:
            text = data[key]
            document: list[int] = []
            sentences: list[int] = []
            for sentence in text if isinstance(text, list) else [text]:
                found = Encoder.tokenizer.tokenize(sentence)
                if len(found) > 0:
                    document.extend(found)
                    sentences.append(len(found))
            if len(document) > 0:
                document.append(Encoder.tokenizer.eod)
                sentences[-1] += 1
            ids[key], lengths[key] = document, sentences
        return ids, lengths, len(line)


def megatron(*, inputs: list[str], tokenizer: str, workers: int, out: str) -> Answer:
    """Its way: a pool that encodes, a document a call, 32 a message, and this process, which writes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = f"{fresh(out)}/text_document"
    watch = stopwatch()
    encoder = Encoder(tokenizer)
    vocab_size = encoder.build().vocab_size
    pool = multiprocessing.get_context("fork").Pool(workers, initializer=encoder.initializer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    tokens = documents = 0
    for ids, lengths, _ in pool.imap(encoder.encode, lines_of(inputs), 32):
        for key in ids:
            builder.add_document(ids[key], lengths[key])
        tokens += sum(lengths["text"])
        documents += 1
    builder.finalize(f"{prefix}.idx")
    pool.close()
    pool.join()
    return watch() | {"tokens": tokens + documents}  # it writes no bos


def convert(*, tokenizer: str, out: str) -> None:
    """The sentencepiece model as a tokenizer.json, by transformers: datatrove reads no other."""
    from transformers import LlamaTokenizer

    folder = fresh(f"{out}.from")
    shutil.copy(tokenizer, f"{folder}/tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).backend_tokenizer.save(out)


def datatrove(*, inputs: list[str], tokenizer: str, workers: int, out: str) -> Answer:
    """A task for each worker, which reads files of its own; documents are not shuffled."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = fresh(out)
    steps = [
        JsonlReader(str(Path(inputs[0]).parent), glob_pattern="*.jsonl"),
        DocumentTokenizer(f"{folder}/tokens", tokenizer, eos_token="</s>", shuffle_documents=False),
    ]
    watch = stopwatch()
    LocalPipelineExecutor(
        steps, tasks=workers, workers=workers, logging_dir=f"{folder}/logs", start_method="fork"
    ).run()
    taken = watch()
    size = sum(file.stat().st_size for file in Path(folder).glob("tokens/*.ds"))
    documents = sum(file.stat().st_size // 8 for file in Path(folder).glob("tokens/*.ds.index"))
    return taken | {"tokens": size // 2 + documents}


# Tokens to batches. `pair` is the prefix of a .bin/.idx of uint16; what is loaded are int64 tensors of length + 1.


def samples_of(pair: str, length: int) -> np.ndarray:
    """The tokens cut into rows of `length` + 1, which share none: uint16 (n, length + 1)."""
    tokens = np.memmap(f"{pair}.bin", dtype=np.uint16, mode="r")
    return tokens[: len(tokens) // (length + 1) * (length + 1)].reshape(-1, length + 1)


def as_tensor(row: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(row.astype(np.int64))


def orders(count: int) -> Iterator[int]:
    """All of range(count) in one random order after another."""
    rng = np.random.default_rng(0)
    return chain.from_iterable(rng.permutation(count).tolist() for _ in repeat(None))


def bare(*, pair: str, length: int, seconds: float, work: str) -> Answer:
    def load() -> Iterator[int]:
        tokens = np.memmap(f"{pair}.bin", dtype=np.uint16, mode="r")
        for i in orders((len(tokens) - 1) // length):
            torch.from_numpy(tokens[i * length : i * length + length + 1].astype(np.int64))
            yield length

    return measure_loader(load, seconds)


def gpt_dataset(*, pair: str, length: int, seconds: float, work: str) -> Answer:
    """Its indexes are made in a first process; later ones find them, as a run that goes on does."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokens:
        vocab_size, eod, pad = 32000, 2, -1
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    def load() -> Iterator[int]:
        config = GPTDatasetConfig(
            random_seed=0, sequence_length=length, blend=([pair], None), split="1,0,0", tokenizer=Tokens(),
            path_to_cache=f"{work}/megatron", reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        indexed = IndexedDataset(pair, multimodal=False, mmap=True)
        documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
        dataset = GPTDataset(indexed, pair, documents, None, Split.train, config)
        for i in cycle(range(len(dataset))):
            dataset[i]
            yield length

    return measure_loader(load, seconds)


def write_datasets(*, pair: str, length: int, work: str) -> None:
    import datasets  # noqa: F401
    import pyarrow

    rows = samples_of(pair, length)
    schema = pyarrow.schema([("tokens", pyarrow.list_(pyarrow.uint16(), length + 1))])
    with pyarrow.ipc.new_stream(fresh(f"{work}/datasets") + "/data.arrow", schema) as file:
        for start in range(0, len(rows), 1000):
            column = pyarrow.FixedSizeListArray.from_arrays(rows[start : start + 1000].ravel(), length + 1)
            file.write_batch(pyarrow.record_batch([column], names=["tokens"]))


def huggingface(*, pair: str, length: int, seconds: float, work: str) -> Answer:
    """Some at a time, which is five times as fast as one by one."""
    from datasets import Dataset

    def load() -> Iterator[int]:
        dataset = Dataset.from_file(f"{work}/datasets/data.arrow").with_format("numpy")
        order = orders(len(dataset))
        while True:
            as_tensor(dataset[list(islice(order, TOGETHER))]["tokens"])
            yield TOGETHER * length

    return measure_loader(load, seconds)


def one_row(row: np.ndarray) -> Iterator[np.ndarray]:
    yield row


def write_litdata(*, pair: str, length: int, work: str) -> None:
    import litdata

    litdata.optimize(
        one_row, list(samples_of(pair, length)), fresh(f"{work}/litdata"), chunk_size=(length + 1) << 13, num_workers=1,
        item_loader=litdata.TokensLoader(block_size=length + 1), verbose=False,
    )  # fmt: skip


def load_litdata(*, pair: str, length: int, seconds: float, work: str) -> Answer:
    import litdata

    def load() -> Iterator[int]:
        loader = litdata.TokensLoader(block_size=length + 1)
        dataset = litdata.StreamingDataset(f"{work}/litdata", item_loader=loader, shuffle=True)
        for row in chain.from_iterable(repeat(dataset)):
            as_tensor(np.asarray(row))
            yield length

    return measure_loader(load, seconds)


def import_streaming() -> Any:
    """Without its data sets of images, which want torchvision, whose packages on PyPI want the torch of CUDA."""
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    import streaming

    return streaming


def write_streaming(*, pair: str, length: int, work: str) -> None:
    streaming = import_streaming()
    columns = {"tokens": f"ndarray:uint16:{length + 1}"}
    with streaming.MDSWriter(out=fresh(f"{work}/streaming"), columns=columns) as file:
        for row in samples_of(pair, length):
            file.write({"tokens": np.array(row)})


def load_streaming(*, pair: str, length: int, seconds: float, work: str) -> Answer:
    streaming = import_streaming()

    def load() -> Iterator[int]:
        dataset = streaming.StreamingDataset(local=f"{work}/streaming", shuffle=True, batch_size=TOGETHER)
        for row in chain.from_iterable(repeat(dataset)):
            as_tensor(row["tokens"])
            yield length

    streaming.base.util.clean_stale_shared_memory()
    return measure_loader(load, seconds)


def fresh(folder: str) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    return folder


if __name__ == "__main__":
    answer({
        "raw": raw, "megatron": megatron, "convert": convert, "datatrove": datatrove, "bare": bare,
        "gpt_dataset": gpt_dataset, "write_datasets": write_datasets, "datasets": huggingface,
        "write_litdata": write_litdata, "litdata": load_litdata,
        "write_streaming": write_streaming, "streaming": load_streaming,
    })  # fmt: skip
