"""The parts of cleaning by themselves: hashes of words, signatures, sorted runs, clusters, held-out runs, filters."""

from __future__ import annotations

import builtins
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import WORDS, text_of

from llama_dist.data.clean import duplicates, filters, runs, words
from llama_dist.data.clean.clusters import EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE, Clusters, read_clusters
from llama_dist.data.clean.filters import FILTERS, Filters, chosen_filters, settings_of
from llama_dist.data.clean.minhash import (
    PLACES,
    bands_of,
    chance_found,
    estimated_similarity,
    rows_for,
    signature_of,
)
from llama_dist.data.clean.names import NamesWriter, names_of, sizes_of
from llama_dist.data.clean.overlap import RunFinder, index_held_out
from llama_dist.data.clean.runs import EXACT, NEAR, RunWriter, read_partition
from llama_dist.data.clean.words import WordHasher, content_hash, random_numbers, runs_of_lengths, runs_of_words
from llama_dist.data.documents import Document
from llama_dist.errors import UserError


def shingles_of(text: str) -> set[tuple[str, ...]]:
    found = text.lower().split()
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / len(first | second)


# Words and hashes


def test_words_have_no_case_and_no_punctuation() -> None:
    hasher = WordHasher()
    assert hasher("The cat -- sat!").tolist() == hasher("the CAT sat").tolist()
    assert hasher("the cat").tolist() != hasher("cat the").tolist()
    assert len(hasher(" ... !? ")) == 0 and len(hasher("")) == 0
    assert len(hasher("猫が座った")) == 5 and len(hasher("แมว")) >= 2, "a character is a word where words have no gaps"
    assert len(hasher("naïve café")) == 2


def test_hashes_are_the_same_everywhere() -> None:
    """They go into files that other processes read, and the result must not change with a library's version."""
    assert WordHasher()("the cat").tolist() == [14632902600990866813, 4779597430144128238]
    assert random_numbers(1, seed=0).tolist() == [0xE220A8397B1DCDAF]  # what splitmix64 is published with
    assert content_hash("the cat") == (5461713355364099796, 16171901248340697226)
    assert signature_of(WordHasher()("the cat sat"))[:2].tolist() == [4176551322, 1832288075]


def test_a_huge_document_is_hashed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{i}" for i in range(5000)) + "x" * 300
    whole = WordHasher()(text)
    monkeypatch.setattr(words, "_SLICE", 100)
    monkeypatch.setattr(words, "_CACHED_WORDS", 50)
    sliced = WordHasher()(text)
    assert sliced[:4999].tolist() == whole[:4999].tolist(), "only a word as long as a slice may be cut"


def test_runs_of_words() -> None:
    hashes = WordHasher()("a b c d a b c")
    runs_of_3 = runs_of_words(hashes, 3)
    assert len(runs_of_3) == 5 and runs_of_3[0] == runs_of_3[4] and len(set(runs_of_3.tolist())) == 4
    assert len(runs_of_words(hashes, 8)) == 0 and len(runs_of_words(hashes, 7)) == 1
    together = list(runs_of_lengths(hashes, [2, 3, 7, 9]))
    assert [part.tolist() for part in together] == [runs_of_words(hashes, n).tolist() for n in (2, 3, 7, 9)]


def test_content_hash_sees_all_but_white_space_and_composition() -> None:
    assert content_hash("caf\u00e9  au\nlait ") == content_hash("cafe\u0301 au lait")
    for other in ("Cafe au lait", "caf\u00e9 au lait.", "caf\u00e9 aulait"):
        assert content_hash(other) != content_hash("caf\u00e9 au lait")


# Signatures


def test_signatures_estimate_the_jaccard_index() -> None:
    rng, hasher = random.Random(0), WordHasher()
    base = [f"w{rng.randrange(3000)}" for _ in range(600)]
    errors = []
    for share in (0.0, 0.005, 0.01, 0.03, 0.1) * 20:
        other = [f"x{rng.random()}" if rng.random() < share else word for word in base]
        first, second = " ".join(base), " ".join(other).replace(".", "")
        estimate = estimated_similarity(*(signature_of(hasher(text))[None] for text in (first, second)))[0]
        errors.append(estimate - jaccard(shingles_of(first), shingles_of(second)))
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.045  # sqrt(s (1 - s) / 120) is 0.046 at most


def test_short_texts_are_one_shingle_and_long_ones_go_in_blocks() -> None:
    hasher = WordHasher()
    assert (signature_of(hasher("a cat")) == signature_of(hasher("A cat!"))).all()
    assert (signature_of(hasher("a cat")) != signature_of(hasher("a dog"))).all()
    long = hasher(" ".join(f"w{i}" for i in range(2000)))
    least = np.min([signature_of(long[start : start + 5]) for start in range(len(long) - 4)], axis=0)
    assert (signature_of(long) == least).all()


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_nearly_all_pairs_of_the_similarity(similarity: float) -> None:
    rows = rows_for(similarity)
    assert PLACES % rows == 0 and chance_found(similarity, rows) >= 0.99
    if similarity == 0.8:
        assert rows == 6 and chance_found(0.5, rows) < 0.3
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**32, (4000, PLACES), dtype=np.uint32)
    second = np.where(rng.random(first.shape) < similarity, first, first + 1)
    found = (bands_of(first, rows) == bands_of(second, rows)).any(axis=1).mean()
    assert abs(found - chance_found(similarity, rows)) < 0.01


def test_bands_differ_by_their_place() -> None:
    same = np.full((1, PLACES), 7, np.uint32)
    assert len(set(bands_of(same, 6)[0].tolist())) == PLACES // 6


# Runs and clusters


def test_runs_come_back_by_ranges_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUN_RECORDS", 100)
    rng = np.random.default_rng(0)
    numbered, everything = [], []
    for unit in range(3):
        writer = RunWriter(tmp_path, f"x-{unit}", NEAR)
        keys = rng.integers(0, 2**64, 252, dtype=np.uint64)
        keys[-2:] = 0, 2**64 - 1
        for start in range(0, len(keys), 9):
            writer.add(np.arange(len(keys))[start : start + 9], key=keys[start : start + 9])
        numbered += [(1000 * unit, run) for run in writer.finish()]
        everything += [(int(key), 1000 * unit + i) for i, key in enumerate(keys)]
    assert len(numbered) >= 6
    for of in (1, 2, 7):
        found = []
        for number in range(of):
            for records, documents in read_partition(numbered, NEAR, number=number, of=of):
                found += zip(records["key"].tolist(), documents.tolist(), strict=True)
                assert all(key * of >> 64 == number for key in records["key"].tolist())
        assert sorted(found) == sorted(everything)


def test_clusters_keep_their_first_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_dist.data.clean.clusters._BLOCK", 7)
    rng = random.Random(1)
    pairs = [(rng.randrange(200), rng.randrange(200)) for _ in range(120)]
    clusters = Clusters(tmp_path, 200)
    clusters.join(*np.array(pairs).T)
    clusters.kind[50] = EXACT_DUPLICATE
    clusters.settle()
    group = {i: {i} for i in range(200)}
    for first, second in pairs:
        joined = group[first] | group[second]
        group.update(dict.fromkeys(joined, joined))
    parent, kind = read_clusters(tmp_path, 0, 200)
    assert parent.tolist() == [min(group[i]) for i in range(200)]
    expected = [KEPT if i == min(group[i]) else NEAR_DUPLICATE for i in range(200)]
    assert [k for i, k in enumerate(kind.tolist()) if i != 50] == [k for i, k in enumerate(expected) if i != 50]
    assert kind[50] == EXACT_DUPLICATE
    assert [part.tolist() for part in read_clusters(tmp_path, 20, 5)] == [parent[20:25].tolist(), kind[20:25].tolist()]


@pytest.mark.parametrize("most", [1 << 20, 50, 3])
def test_exact_duplicates_need_all_128_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(duplicates, "MOST_RECORDS", most)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 2**64, 40, dtype=np.uint64)[rng.integers(0, 40, (2, 300))]
    pairs[:, ::3] = pairs[:, :1]  # one text is a third of everything
    writer = RunWriter(tmp_path, "exact", EXACT)
    writer.add(np.arange(300), key=pairs[0], check=pairs[1])
    clusters = Clusters(tmp_path, 300)
    duplicates.find_exact([(0, run) for run in writer.finish()], clusters)
    clusters.settle()
    first = {}
    expected = [first.setdefault(pair, i) for i, pair in enumerate(zip(*pairs.tolist(), strict=True))]
    parent, kind = read_clusters(tmp_path, 0, 300)
    assert parent.tolist() == expected
    assert kind.tolist() == [KEPT if i == expected[i] else EXACT_DUPLICATE for i in range(300)]


def near_duplicates(folder: Path, signatures: np.ndarray, rows: int) -> tuple[list[int], int]:
    folder.mkdir()
    writer, table = RunWriter(folder, "near", NEAR), folder / "signatures"
    signatures.tofile(table)
    bands = bands_of(signatures, rows)
    writer.add(np.repeat(np.arange(len(bands)), bands.shape[1]), key=bands.ravel())
    clusters = Clusters(folder, len(bands))
    left_out = duplicates.find_near(
        [(0, run) for run in writer.finish()], clusters, duplicates.Signatures([(0, table)]), similarity=0.8
    )
    clusters.settle()
    return read_clusters(folder, 0, len(bands))[0].tolist(), left_out


def test_crowded_bands_take_linear_time_and_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 texts that share a band and nothing else: each is compared with the first LEADERS only."""
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (500, PLACES), dtype=np.uint32)
    signatures[:, :6] = 1
    signatures[400] = signatures[3]  # of a leader: found in this band
    signatures[450] = signatures[300]  # of none, but they share the other bands too
    parents, left_out = near_duplicates(tmp_path / "all", signatures, 6)
    assert {i: p for i, p in enumerate(parents) if i != p} == {400: 3, 450: 300}
    assert left_out == 500 - duplicates.LEADERS - 1
    monkeypatch.setattr(duplicates, "MOST_RECORDS", 100)
    assert near_duplicates(tmp_path / "few", signatures, 6) == (parents, left_out)


def test_names_are_found_by_number(tmp_path: Path) -> None:
    writer = NamesWriter(tmp_path / "names")
    for i in range(50):
        writer.add(f"é{i}", 10 * i)
    writer.close()
    assert names_of(tmp_path / "names", np.array([49, 0, 7])) == ["é49", "é0", "é7"]
    assert names_of(tmp_path / "names", np.array([], np.int64)) == []
    assert sizes_of(tmp_path / "names").tolist() == [10 * i for i in range(50)]


# Held-out runs


def test_held_out_runs_are_found_whatever_is_between_words(tmp_path: Path) -> None:
    thirteen = " ".join(f"w{i}" for i in range(13))
    eight, seven = "eight words are enough to look for here", "seven words are too few for this"
    texts = [thirteen + " and more of it", eight, seven]
    held_out = index_held_out([Document(f"h{i}", text) for i, text in enumerate(texts)], tmp_path)
    assert (held_out.ids, held_out.too_short) == (["h0", "h1"], 1)
    finder, hasher = RunFinder(held_out.table), WordHasher()
    shared = [
        finder(hasher(text), f"t{i}")
        for i, text in enumerate(
            [
                "before " + thirteen.upper().replace(" ", ", ") + " after",
                thirteen.removesuffix(" w12") + " w99",
                "so Eight words: are enough to look for here!",
                "seven words are too few for this",
                "",
                thirteen + " and more of it",
            ]
        )
    ]
    assert shared == [1, 0, 1, 0, 0, 5]
    finder.save(tmp_path / "hits.npy")
    hits = list(held_out.hits([tmp_path / "hits.npy"]))
    assert [tuple(hit) for hit in hits] == [("h0", 5, 5, "t0"), ("h1", 1, 1, "t2")]


def test_held_out_texts_that_cannot_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_dist.data.clean.overlap.MOST_WORDS", 100)
    with pytest.raises(UserError, match="more than 100 words.*a part of them at a time"):
        index_held_out([Document("a", text_of(i)) for i in range(5)], tmp_path)


# Filters


def good_text(sentences: int = 8) -> str:
    """Text that passes all filters: sentences on lines, none like another."""
    rng = random.Random(2)
    lines = []
    for i in range(sentences):
        line = " ".join(rng.choice(WORDS) + (str(rng.randrange(99)) if rng.random() < 0.2 else "") for _ in range(12))
        lines.append(f"That {i} the tree and {line} to be of it.")
    return "\n".join(lines)


def rule_of(text: str, *names: str, settings: tuple[str, ...] = ()) -> str | None:
    return Filters(chosen_filters(names, settings))(text, "a").rule


def test_good_text_passes_all() -> None:
    filtered = Filters(chosen_filters(list(FILTERS)))
    assert filtered(good_text(), "a") == (None, good_text()) and not filtered.lines


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        ("The cat and the dog.", "gopher_quality", "short_doc"),
        (good_text().replace(" ", ""), "gopher_quality", "short_doc"),
        ("the of to and " + "a i " * 60, "gopher_quality", "below_avg_threshold"),
        ("the of to and " + "extraordinarily " * 60, "gopher_quality", "above_avg_threshold"),
        (good_text().replace(" the", " # # #"), "gopher_quality", "too_many_hashes"),
        (good_text().replace(" the ", " ... ... ... "), "gopher_quality", "too_many_ellipsis"),
        ("- " + good_text().replace("\n", "\n- "), "gopher_quality", "too_many_bullets"),
        (good_text().replace(".", "…"), "gopher_quality", "too_many_end_ellipsis"),
        ("the of and to " + "1234 " * 60, "gopher_quality", "below_alpha_threshold"),
        ("cats sleep under trees " * 20, "gopher_quality", "enough_stop_words"),
        ("\n".join(["the same line"] * 10), "gopher_repetition", "dup_line_frac"),
        ("\n\n".join(["the same paragraph"] * 10), "gopher_repetition", "dup_para_frac"),
        ("cats sleep " * 40, "gopher_repetition", "top_2_gram"),
        ("Lorem ipsum dolor sit amet.\n" * 6, "c4", "lorem_ipsum"),
        ("function f() { return the value; }.\n" * 6, "c4", "curly_bracket"),
        ("One sentence is too few for this.", "c4", "too_few_sentences"),
        ("\n".join(good_text().replace(".", "").split("\n")), "fineweb", "line_punct_ratio"),
        ("It is.\n" * 3 + "So.\nWe go.\nThey.", "fineweb", "short_line_ratio"),
        (good_text() + "\n" + good_text(), "fineweb", "char_dup_ratio"),
    ],
)
def test_the_published_rules(text: str, name: str, rule: str) -> None:
    assert rule_of(text, name) == f"{name}.{rule}"


def test_filters_come_in_order_and_c4_takes_lines_out() -> None:
    filtered = Filters(chosen_filters(["c4", "gopher_quality"]))
    bad = ["No end mark here", "Please enable javascript to see.", "read our privacy policy there.", "Two words."]
    text = "\n".join([good_text(), *bad])
    assert filtered(text, "a") == (None, good_text())
    assert filtered.lines == {
        "c4.line_no_terminal_punc": 1,
        "c4.line_javascript": 1,
        "c4.line_policy": 1,
        "c4.line_too_few_words": 1,
    }
    assert filtered("Too short. " * 7, "a").rule == "gopher_quality.short_doc", "it has passed c4"


def test_thresholds_by_name() -> None:
    short = "The cat and the dog."
    assert rule_of(short, "gopher_quality", settings=("gopher_quality.min_doc_words=5",)) is None
    assert rule_of(short, "gopher_quality", settings=("gopher_quality.min_doc_words=null",)) is None
    few = ("gopher_quality.max_doc_words=20",)
    assert rule_of(good_text(), "gopher_quality", settings=few) == "gopher_quality.long_doc"
    stop = ("gopher_quality.min_doc_words=1", 'gopher_quality.stop_words=["cat","dog."]')
    assert rule_of(short, "gopher_quality", settings=stop) is None
    grams = ("gopher_repetition.top_n_grams=[[2,0.9]]", "gopher_repetition.dup_n_grams=[]")
    assert rule_of("cats sleep " * 5, "gopher_repetition", settings=grams) == "gopher_repetition.top_2_gram"
    assert rule_of("{ is text. " * 9, "c4", settings=("c4.filter_curly_bracket=false",)) is None
    assert all(settings_of(name) for name in FILTERS)


@pytest.mark.parametrize(
    ("names", "setting", "message"),
    [
        (["gofer_quality"], [], r"'gofer_quality' is not one \(did you mean gopher_quality\?\); there are gopher_qua"),
        (["c4"], ["c4.min_sentences=3"], r"has no setting 'min_sentences' \(did you mean min_num_sentences\?\)"),
        (["c4"], ["fineweb.new_line_ratio=1"], "'fineweb' is not among --filters .c4."),
        (["c4"], ["min_num_sentences"], "is not FILTER.SETTING=VALUE"),
        (["c4"], ["c4.min_num_sentences=many"], "'many' does not fit; this setting is a number"),
        (["c4"], ["c4.filter_policy=1"], "'1' does not fit; this setting is true or false"),
        (["gopher_quality"], ["gopher_quality.stop_words=the"], "'the' does not fit; this setting is a JSON list"),
    ],
)
def test_choices_that_there_are_not(names: list[str], setting: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_filters(names, setting)


def test_a_filter_that_fails_says_so() -> None:
    filtered = Filters(chosen_filters(["c4"]))
    filtered._filters[0][1].filter = lambda document: 1 / 0
    assert filtered("text", "a").rule == "c4.failed"


def test_without_datatrove_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "datatrove"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__
    monkeypatch.setattr(
        filters.importlib, "import_module", lambda name: real("no_such_module_as_datatrove")
    )
    with pytest.raises(UserError, match=r"need datatrove.*pip install 'llama_dist\[clean\]'"):
        Filters(chosen_filters(["c4"]))
    assert Filters([])("any text", "a") == (None, "any text"), "without filters it is not needed"
