"""The tokenizer files of an export: what Transformers and llama.cpp look for beside the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llama_dist.data.byte_pairs import is_ranks
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.errors import UserError
from llama_dist.exchange.importing import TOKENIZER_FILES
from llama_dist.exchange.tokenizer_json import is_same, of_ranks, of_sentencepiece, put_bos_first_

CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer and the file that it is of. `kind`: "sentencepiece", "tiktoken" or "json"."""

    path: Path
    kind: str
    tokenizer: Tokenizer


def open_tokenizer(path: str | Path) -> TokenizerSource:
    """The tokenizer in a file or folder. Raises UserError as `load_tokenizer`."""
    tokenizer, path = load_tokenizer(path), Path(path)
    if path.is_dir():
        path = next(path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file())
    if path.suffix == ".json":
        return TokenizerSource(path, "json", tokenizer)
    return TokenizerSource(path, "tiktoken" if is_ranks(path.read_bytes()) else "sentencepiece", tokenizer)


def as_hugging_face(source: TokenizerSource) -> tokenizers.Tokenizer:
    """The same tokenizer as a Hugging Face one, bos before every text."""
    make = {"json": lambda path: tokenizers.Tokenizer.from_file(str(path)), "tiktoken": of_ranks}
    made = make.get(source.kind, of_sentencepiece)(source.path)
    put_bos_first_(made, source.tokenizer.bos_id)
    return made


def write_tokenizer(source: TokenizerSource, folder: Path, *, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and what else belongs to them, so that AutoTokenizer loads them.

    Files that came from Hugging Face together, a tokenizer_config.json among them, go on together as they are. Raises
    UserError where no tokenizer.json gives the ids of ours.
    """
    if source.kind != "tiktoken" and (source.path.parent / CONFIG).is_file():
        for name in TOKENIZER_FILES:
            if (source.path.parent / name).is_file():
                shutil.copyfile(source.path.parent / name, folder / name)
        return
    made = as_hugging_face(source)
    if source.kind == "sentencepiece":
        shutil.copyfile(source.path, folder / "tokenizer.model")
    if source.kind != "json" and not is_same(made, source.tokenizer):
        raise UserError(
            f"{source.path}: its rules have no equal among those of a tokenizer.json, so that Transformers would give "
            "other ids; export with --no-tokenizer and use the file through sentencepiece"
        )
    made.save(str(folder / "tokenizer.json"))
    text = json.dumps(_config(made, source, max_length), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _config(made: tokenizers.Tokenizer, source: TokenizerSource, max_length: int) -> dict[str, Any]:
    bos_id, eos_id = source.tokenizer.bos_id, source.tokenizer.eos_id
    named = {"bos_token": bos_id, "eos_token": eos_id}
    return {
        # Loads tokenizer.json as it is, in Transformers 4 and 5 alike.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: made.id_to_token(number) for name, number in named.items() if number is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
