"""MANIFEST.json of a shard directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from llama_dist.data.storage import Storage
from llama_dist.errors import UserError

MANIFEST = "MANIFEST.json"
FORMAT: Final = "llama_dist token shards v1"

FileName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # in the folder itself, whatever the manifest claims


class FileEntry(TypedDict):
    """A file's size and xxh3-128 in hexadecimal; for a .bin file also what it holds, which older manifests lack."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    bytes: NonNegativeInt
    xxh3_128: str
    tokens: NotRequired[NonNegativeInt]
    documents: NotRequired[NonNegativeInt]


class TokenizerEntry(TypedDict):
    """What made the tokens: the file, its sha256 and its numbers."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    file: str
    fingerprint: str
    vocab_size: NonNegativeInt
    bos_id: int | None
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """What a shard directory says of itself, in MANIFEST.json.

    `unigram_entropy` is in nats per token, from the exact counts; `raw_bytes` is the size of the texts in UTF-8,
    for bits per byte; `inputs` have bytes and xxh3_128 for each file. `reading` is how the inputs were read, `skipped`
    how many of their documents were not, by what was wrong; older manifests lack both.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    tokens: NonNegativeInt
    documents: NonNegativeInt
    raw_bytes: NonNegativeInt
    unigram_entropy: float
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
    tokenizer: TokenizerEntry
    inputs: list[dict[str, Any]]
    files: dict[FileName, FileEntry]
    command: str
    format: Literal["llama_dist token shards v1"] = FORMAT
    reading: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, NonNegativeInt] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


SCHEMA = TypeAdapter(Manifest)


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of the shard directory at a storage. Raises UserError where it is missing or is not one."""
    content = storage.read(MANIFEST)
    try:
        return SCHEMA.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"is damaged ({where + ': ' if where else ''}{first['msg']}); copy or make the shard directory again"
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and "tokenizer" not in values:
            problem = "is that of something else, not of a shard directory"
        elif isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            problem = f"format is {values['format']!r}; this version reads {FORMAT!r}; make the shards again"
        raise UserError(f"{storage.path}/{MANIFEST}: {problem}") from error
