"""A Hugging Face tokenizer that gives the ids of ours, made of a sentencepiece model or of tiktoken's ranks.

Transformers' own conversion of a sentencepiece model gives other ids where a text begins with a space.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llama_dist.data.byte_pairs import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS, parse_ranks
from llama_dist.data.sentencepieces import SPACE
from llama_dist.data.tokenizer import Tokenizer

PROBES = (
    "",
    "Once upon a time, there was a little girl.",
    " a text that begins with a space",
    "  two,   three,     five and       seven\n\n\n\tlines\r\n    def f(x):\n        return x[1:-1]  ",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e, \u0440\u0443\u0441\u0441\u043a\u0438\u0439, \U0001f600\U0001f468\u200d\U0001f469",
    "12345 3.14159 1e-5 aaaaaaaaaaaaaaaaaaaaa ======== e\u0301 \ufb01 \u2460 \u00a0 \u3000",
    "It's they'll WE'VE isn't\u2019s <tag attr='1'/> https://example.org/?a=b&c=d",
)


def is_same(tokenizer: tokenizers.Tokenizer, ours: Tokenizer) -> bool:
    """Whether both give the same ids for texts of many kinds."""
    return all(tokenizer.encode(text, add_special_tokens=False).ids == ours.encode(text) for text in PROBES)


def of_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The same vocabulary and rules as the sentencepiece model at `path`, as far as the library has them."""
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    trainer = model.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        vocabulary = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        pieces = {piece.piece: number for number, piece in enumerate(model.pieces)}
        unknown = model.pieces[trainer.unk_id].piece
        vocabulary = models.BPE(
            pieces, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(model)))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    # Not the unknown piece: a text that has "<unk>" in it is spelled out, as sentencepiece does.
    special = [p.piece for p in model.pieces if p.type == p.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    given = [p.piece for p in model.pieces if p.type == p.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in given])
    return tokenizer


def of_ranks(path: Path) -> tokenizers.Tokenizer:
    """LLaMA-3's tokenizer of the tiktoken ranks at `path`."""
    ranks = parse_ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:  # in the order of their ranks, which is that of the merges
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        both = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += [(spelled[left], spelled[right]) for left, right in sorted(both, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    # A word that is a token is that token, whether or not merges lead to it: so does tiktoken.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL_TOKENS])
    return tokenizer


def put_bos_first_(tokenizer: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Have it put bos before a text, as it stands before every document in training, unless it adds tokens already."""
    if bos_id is None or tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        return
    bos = tokenizer.id_to_token(bos_id)
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = template if before is None else processors.Sequence([before, template])


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of the highest score first, which sentencepiece merges first."""
    ids = {p.piece: number for number, p in enumerate(model.pieces) if p.type in (p.NORMAL, p.UNUSED)}
    ways = []
    for piece, number in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ways.append((-model.pieces[number].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]


def _normalizers(model: ModelProto) -> Iterator[normalizers.Normalizer]:
    spec = model.normalizer_spec
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(" {2,}"), " ")
        yield normalizers.Strip()
    if spec.escape_whitespaces:
        yield normalizers.Replace(" ", SPACE)
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies spell each byte with: itself where it is seen, or one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}
