"""How fast text becomes token ids, beside a plain loop over the library's own encode.

    python benchmarks/tokenizing.py TOKENIZER... --corpora FOLDER [--mb 50]

The corpora, cut into documents of 1 to 3 thousand characters and shuffled, are encoded once by a new tokenizer
("once"), and then as often as it takes to make --mb ("repeated", from the beginning, by another new one). The loop and
ours take turns, a megabyte each, so that a machine that slows down slows both, and every id is compared. Times are of
the processor, of one process with one thread.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import chain, cycle
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from llama_dist.data.byte_pairs import LLAMA3_PATTERN, HuggingFaceTokenizer, TiktokenTokenizer, parse_ranks
from llama_dist.data.documents import read_documents
from llama_dist.data.tokenizer import load_tokenizer

BATCH_BYTES = 1 << 20


def documents_of(folder: Path) -> list[str]:
    draw = random.Random(0)
    documents = []
    for document in read_documents([folder]):
        start = 0
        while start < len(document.text):
            stop = start + draw.randint(1000, 3000)
            documents.append(document.text[start:stop])
            start = stop
    draw.shuffle(documents)
    return documents


def plain_encode(file: Path) -> Callable[[str], list[int]]:
    """The library's own function, which takes special tokens for text as ours does."""
    kind = type(load_tokenizer(file))
    if kind is HuggingFaceTokenizer:
        hugging_face = tokenizers.Tokenizer.from_file(str(file))
        hugging_face.encode_special_tokens = True
        return lambda text: hugging_face.encode(text, add_special_tokens=False).ids
    if kind is TiktokenTokenizer:
        ranks = parse_ranks(file)
        return tiktoken.Encoding(
            "", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary
    return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode


def batches(documents: Iterator[str], total: int) -> Iterator[list[str]]:
    """Batches of BATCH_BYTES, until there are `total` bytes of them or no more documents."""
    while total > 0:
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document.encode())
            if size >= min(BATCH_BYTES, total):
                break
        if not batch:
            return
        total -= size
        yield batch


def measure(file: Path, documents: Iterator[str], total: int) -> str:
    """MB/s of the loop and of ours, and their ratio."""
    plain, ours = plain_encode(file), load_tokenizer(file)
    size, plain_seconds, our_seconds = 0, 0.0, 0.0
    for batch in batches(documents, total):
        started = time.process_time()
        expected = [plain(text) for text in batch]
        between = time.process_time()
        ids, lengths = ours.encode_batch(batch)
        our_seconds += time.process_time() - between
        plain_seconds += between - started
        size += sum(len(text.encode()) for text in batch)
        assert lengths.tolist() == list(map(len, expected)), f"{file}: other lengths than the library's"
        assert np.array_equal(ids, list(chain.from_iterable(expected))), f"{file}: other ids than the library's"
    loop, mine = size / plain_seconds / 1e6, size / our_seconds / 1e6
    return f"{size / 1e6:7.1f} MB   loop {loop:6.2f} MB/s   ours {mine:6.2f} MB/s   ratio {mine / loop:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER", help="the files to compare with")
    parser.add_argument("--corpora", type=Path, required=True, metavar="FOLDER", help="of text, in any form")
    parser.add_argument("--mb", type=float, default=50)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    documents = documents_of(args.corpora)
    size = sum(len(text.encode()) for text in documents)
    for file in args.tokenizers:
        print(f"{file}", flush=True)
        print(f"  once     {measure(file, iter(documents), size)}", flush=True)
        print(f"  repeated {measure(file, cycle(documents), int(args.mb * 1e6))}", flush=True)


if __name__ == "__main__":
    main()
