"""Text, shards, tokenizers, packed indices, manifests and streams, broken at random: nothing breaks in silence.

    python tests/fuzz_data.py --count 1000 --seed 1
    python tests/fuzz_data.py --case shards:17 --seed 1      one case again, with its traceback

One file of a case is truncated, flipped, swapped, emptied, gone, a folder, a loop of links, ... Then what reads it must
say so (refused: in a UserError or in what `verify` lists), or count what it left out (skipped), or give what was there
before (harmless). Anything else fails: another exception, the death of the process, wrong data, a hang. Each case runs
in a process of its own; case i of seed s is always the same.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "unit"), str(HERE)]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import test_broken_text as broken_text  # noqa: E402
from conftest import SHARED_DATA  # noqa: E402
from data_helpers import make_shards, small_tokenizer, text_of, write_jsonl  # noqa: E402
from text_helpers import WRITERS, texts_of  # noqa: E402

from llama_dist.config_data import DataConfig, Source, StreamSource  # noqa: E402
from llama_dist.data import spool_writer, units  # noqa: E402
from llama_dist.data.loader import Loader  # noqa: E402
from llama_dist.data.packing import find_packing_damage, pack  # noqa: E402
from llama_dist.data.prepare import prepare  # noqa: E402
from llama_dist.data.shards import Shards, verify  # noqa: E402
from llama_dist.data.spool import jobs_of  # noqa: E402
from llama_dist.data.tokenizer import fingerprint_of, load_tokenizer  # noqa: E402
from llama_dist.data.verify import verify_shards  # noqa: E402
from llama_dist.errors import RunError, UserError  # noqa: E402

SEQ_LEN, STEPS, BATCH, VOCAB = 16, 30, 4, 340
TEXTS, OTHERS = texts_of(40), [text_of(i) for i in range(10)]
OUTCOMES = ("refused", "skipped", "harmless", "FAILED")
WHOLE = "whole"  # folder of a case, with its files as they were
SHARDS = Path("shards-0")


class Killed(Exception):
    """Stands for a kill."""


def make_base(folder: Path) -> None:
    """What is to be broken: a folder for each family."""
    for family in ("text", "tokenizers", "units", "streams"):
        (folder / family).mkdir(parents=True)
    make_shards(folder / "shards", pair_tokens=800)
    pack(folder / "shards" / SHARDS, seq_len=SEQ_LEN, workers=1)
    for suffix, write in WRITERS.items():
        write(folder / f"text/broken{suffix}", TEXTS)
    published = [SHARED_DATA / "tokenizers" / name for name in ("gpt2_tokenizer.json", "small/torchtitan_tokenizer.json")]
    published += sorted((SHARED_DATA / "tokenizers/small").glob("*.model"))
    for file in (small_tokenizer(), *filter(Path.is_file, published)):
        shutil.copy(file, folder / "tokenizers" / file.name)
    for family, work in (("units", prepare_units), ("streams", partial(write_spool, tokens=2000))):
        os.chdir(folder / family)
        write_jsonl(Path("text.jsonl"), OTHERS * 4)
        with suppress(Killed), patch.object(units, "_encode", _some(units._encode, 3)):
            work()


def _some(function: Callable[..., None], times: int) -> Callable[..., None]:
    """The function, until it was called so many times; then the kill comes."""
    calls: list[None] = []

    def call(*arguments: object) -> None:
        if len(calls) == times:
            raise Killed
        calls.append(function(*arguments))

    return call


def prepare_units() -> None:
    prepare(["text.jsonl"], small_tokenizer(), "out", workers=1, unit_bytes=1000)


def write_spool(*, tokens: int) -> Path:
    """Fill a stream's spool until so many tokens are there, or to the end."""
    source = Source(stream=StreamSource(path="text.jsonl"))
    data = DataConfig(tokenizer=str(small_tokenizer()), train=[source], seq_len=SEQ_LEN)
    (job,) = jobs_of(data, fingerprint=fingerprint_of(data.tokenizer), folder=Path("stream"), logs=Path("logs"))
    (job.folder / "wanted").mkdir(parents=True, exist_ok=True)
    (job.folder / f"wanted/{tokens:016d}").touch()
    with patch.multiple(spool_writer, FIRST_PAIR=400, BATCH_CHARACTERS=400, AHEAD=400):
        spool_writer.write_spool(job, pause=_some(lambda: None, 0))
    return job.folder


def documents(path: str | Path) -> list[list[int]]:
    shards = Shards(path)
    return [shards.document(i).tolist() for i in range(shards.num_documents)]


def samples(path: Path, packing: str) -> list[list[int]]:
    """What a run would read of a shard directory."""
    settings = {"packing": packing, "document_mask": True, "seq_len": SEQ_LEN, "train": [Source(shards=str(path))]}
    data = DataConfig(tokenizer=str(small_tokenizer()), **settings)  # type: ignore[arg-type]
    loader = Loader(data, vocab_size=VOCAB, global_batch=BATCH, micro_batch=BATCH, dp=1, dp_rank=0)
    return [row for step in range(STEPS) for b in loader.microbatches(BATCH * step) for row in b.tokens.tolist()]


def check_text(file: Path) -> str:
    """What is intact comes, and what does not is counted."""
    others = write_jsonl(Path("intact.jsonl"), OTHERS)
    sizes = {"workers": 1, "unit_bytes": 700, "max_skipped": "100%", "reading": broken_text.READING}
    made = prepare([file, others], small_tokenizer(), "out", **sizes)  # type: ignore[arg-type]
    verify("out")
    tokenizer, skipped = load_tokenizer(small_tokenizer()), list(made.manifest.skipped)
    found = [tokenizer.decode(ids[1:-1]) for ids in documents("out")]
    assert found[-len(OTHERS) :] == OTHERS, "documents of an intact file are missing"
    whole, raw = (WHOLE / file).read_bytes(), file.read_bytes()
    if all(raw != other.read_bytes() for other in Path(WHOLE).iterdir()):  # not another intact file under its name
        name = f"{len(found) - len(OTHERS)} documents of {file}, skipped {made.manifest.skipped}"
        suffix = file.name.removeprefix("broken")
        broken_text.check(whole, raw, TEXTS, found[: -len(OTHERS)], skipped, "", suffix, name)  # type: ignore[arg-type]
    return "skipped" if skipped else "harmless"


def check_shards(file: Path) -> str:
    """Verification finds it, or what is read is the same; reading alone gives nothing worse than a UserError."""
    packing = "best_fit" if file.parent.name.startswith("packed") else "concat"
    read = (documents, partial(samples, packing=packing))
    found, refused = [], 0
    for work in (*read, lambda path: verify_shards(path).problems, partial(find_packing_damage, seq_len=SEQ_LEN)):
        try:
            found.append(work(SHARDS))  # type: ignore[operator]
        except UserError:
            refused += 1
    if refused or any(found[len(read) :]):
        return "refused"
    assert found[: len(read)] == [work(WHOLE / SHARDS) for work in read], "other data, and nothing is said"
    return "harmless"


def check_pair(file: Path) -> str:
    """Without checksums ids may change within the vocabulary; a damaged index is found."""
    for prefix in sorted(SHARDS.glob("0*.idx")):
        if verify_shards(prefix.with_suffix(""), tokenizer=small_tokenizer()).problems:
            return "refused"
        documents(prefix.with_suffix(""))
    return "harmless"


def check_tokenizer(file: Path) -> str:
    """It does not load, or it works and is not mistaken for what it was."""
    tokenizer = load_tokenizer(file)
    ids, lengths = tokenizer.encode_batch(TEXTS, bos_eos=True)
    assert len(ids) == lengths.sum() and 0 <= ids.min() and ids.max() < tokenizer.vocab_size
    tokenizer.decode(ids.tolist())
    changed = file.read_bytes() != (WHOLE / file).read_bytes()
    assert changed == (tokenizer.fingerprint != fingerprint_of(WHOLE / file)), "its fingerprint is another's"
    return "refused" if changed else "harmless"


def check_work(file: Path, *, go_on: Callable[[], object], out: str) -> str:
    """Work that is gone on with after a kill gives what it would have given."""
    for manifest in Path(".").glob(f"{out}/MANIFEST.json"):
        verify(manifest.parent)  # as each start of a run does
    go_on()
    (folder,) = Path(".").glob(out)
    verify(folder)
    expected, lengths = load_tokenizer(small_tokenizer()).encode_batch(OTHERS * 4, bos_eos=True)
    found = documents(folder)
    assert sum(found, []) == expected.tolist() and [*map(len, found)] == lengths.tolist(), "other data, and nothing is said"
    return "harmless"


FAMILIES: dict[str, tuple[str, str, Callable[[Path], str]]] = {  # folder, which of its files, and what they are held to
    "text": ("text", "*", check_text),
    "shards": ("shards", "shards-0/*", check_shards),
    "manifests": ("shards", "shards-0/MANIFEST.json", check_shards),
    "packed": ("shards", "shards-0/packed-*/*", check_shards),
    "pairs": ("shards", "shards-0/0*", check_pair),
    "tokenizers": ("tokenizers", "*", check_tokenizer),
    "units": ("units", "out.partial/**/*", partial(check_work, go_on=prepare_units, out="out")),
    "streams": ("streams", "stream/*/*", partial(check_work, go_on=partial(write_spool, tokens=10**9), out="stream/*")),
}
TURNS = (*["text"] * 5, *FAMILIES)


def damage(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    """Break one file, which may take the content of another."""
    raw, how = file.read_bytes(), draw.randrange(12)
    file.unlink()
    if how == 0:
        file.mkdir()
    elif how == 1:
        file.symlink_to(file.name)
    elif how == 2:
        shutil.copy(draw.choice([other for other in others if other != file]), file)
    elif how > 3:
        file.write_bytes(draw.choice(broken_text.BREAKS)(raw or b"\0", draw))


def run_case(name: str, seed: int, base: Path, folder: Path) -> str:
    """The outcome of a case; if it failed, and how."""
    of, pattern, check = FAMILIES[name.split(":")[0]]
    draw = random.Random(f"{seed} {name}")
    shutil.copytree(base / of, folder)
    shutil.copytree(base / of, folder / WHOLE)
    os.chdir(folder)
    file = draw.choice(sorted(path for path in Path(".").glob(pattern) if path.is_file()))
    damage(file, sorted(path for path in file.parent.rglob("*") if path.is_file() and WHOLE not in path.parts), draw)
    try:
        return check(file)
    except (UserError, RunError) as error:
        assert str(error).strip(), "a refusal says why"
        return "refused"
    except BaseException as error:
        traceback.print_exc()
        return f"FAILED: {file}: {type(error).__name__}: {error}"[:300]


def in_child(work: Callable[[], str], log: Path, seconds: float) -> str:
    """What `work` returns in a process of its own, or what became of that; what it prints goes to `log`."""
    log.parent.mkdir(exist_ok=True)
    answer = log.with_suffix(".outcome")
    if not (child := os.fork()):
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        try:
            answer.write_text(work())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    end_at = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end_at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"FAILED: not done in {seconds:.0f} seconds"
        time.sleep(0.002)
    if not answer.exists():
        return f"FAILED: its process ended with {os.waitstatus_to_exitcode(ended[1])}"
    return answer.read_text()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", metavar="NAME", help="this case alone")
    parser.add_argument("--seconds", type=float, default=30.0, help="after which a case is taken to hang")
    chosen = parser.parse_args(arguments)
    names = [chosen.case] if chosen.case else [f"{TURNS[i % len(TURNS)]}:{i}" for i in range(chosen.count)]
    table: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    small_tokenizer()
    with tempfile.TemporaryDirectory() as place:
        base, log = Path(place) / "base", Path(place) / "logs/base"
        made = in_child(lambda: make_base(base) or "made", log, 120)
        assert made == "made", f"{made}\n{log.read_text()}"
        for name in names:
            folder, log = Path(place) / "case", Path(place) / f"logs/{name}"
            outcome, *told = in_child(partial(run_case, name, chosen.seed, base, folder), log, chosen.seconds).split(": ", 1)
            table[name.split(":")[0]][outcome] += 1
            shutil.rmtree(folder, ignore_errors=True)
            if told:
                print(f"--case {name} --seed {chosen.seed}: {told[0]}", flush=True)
            if told and chosen.case:
                print(log.read_text(), end="")
    print("".join(f"{word:>12}" for word in ("", *OUTCOMES)))
    for family, counts in table.items():
        print(f"{family:>12}" + "".join(f"{counts[outcome]:12,}" for outcome in OUTCOMES))
    failed = sum(counts["FAILED"] for counts in table.values())
    print(f"seed {chosen.seed}: {len(names):,} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
