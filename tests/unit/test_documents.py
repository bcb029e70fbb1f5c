"""Raw text is read as it is meant, and a bad input is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_dist.data.documents import Document, Reading, Skipped, read_documents, read_part, with_line
from llama_dist.data.inputs import Part
from llama_dist.errors import UserError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_txt_is_one_document_without_bom_and_with_newlines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\ufeffone\r\ntwo é\n\rthree".encode())
    assert list(read_documents([file])) == [Document(str(file), "one\ntwo é\n\rthree")]


def test_a_gigantic_line_is_a_document(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"x" * 5_000_000)
    assert len(next(read_documents([file])).text) == 5_000_000


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    content = '\ufeff{"text": "a\\r\\nb", "id": 7, "more": 1}\r\n\n  \n{"text": "\\u00e9\\ud83d\\ude00"}\n{"text": ""}'
    file = write(tmp_path / "a.jsonl", content.encode())
    assert list(read_documents([file])) == [Document("7", "a\r\nb"), Document(f"{file}:4", "é😀")]


def test_files_in_order_and_folders_sorted(tmp_path: Path) -> None:
    (tmp_path / "f/sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "f/z.txt", "f/sub/y.txt", "f/skipped.bin"):
        write(tmp_path / name, name.encode())
    paths = [tmp_path / "b.txt", tmp_path / "f", tmp_path / "a.txt"]
    assert [d.text for d in read_documents(paths)] == ["b.txt", "f/sub/y.txt", "f/z.txt", "a.txt"]


BAD = {
    "utf8.txt": (b"one\ntwo\nthr\xffee", r"utf8.txt:3: byte 11 of the file \(0xff\) is not UTF-8"),
    "bom.txt": (b"\xef\xbb\xbfok\n\xe9", r"bom.txt:2: byte 6 "),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"utf8.jsonl:2: byte 24 of the file \(0xe9\)"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b', r"cut.jsonl:3: not valid JSON"),
    "deep.jsonl": (b"[" * 200_000, r"deep.jsonl:1: not valid JSON"),
    "notext.jsonl": (b'{"txt": "a", "n": 1}', r"notext.jsonl:1: no string \"text\" \(found: keys 'txt', 'n'\)"),
    "number.jsonl": (b'{"text": 5}', r"number.jsonl:1: no string \"text\""),
    "list.jsonl": (b'["text"]', r"list.jsonl:1: no string \"text\" \(found: list\)"),
    "half.jsonl": (b'{"text": "ab\\ud83d"}', r"half.jsonl:1: character 2 of the text is half a surrogate"),
    "empty.txt": (b"", r"empty.txt: no documents with text"),
    "blank.jsonl": (b'\n{"text": ""}\n', r"blank.jsonl: no documents with text"),
    "nul.txt": (b"a\0b\0", r"nul.txt: character 1 of the text is NUL"),
    "data.bin": (b"PAR1", r"data.bin: is not a kind of file that is read here; allowed are .txt, .jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(UserError, match=message):
        list(read_documents([write(tmp_path / name, content)]))


def test_missing_inputs_are_named_before_anything_is_read(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match="absent.txt: there is no such file"):
        next(read_documents([good, tmp_path / "absent.txt"]))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: no file in this folder is of the kinds .txt, "):
        next(read_documents([good, tmp_path / "folder"]))
    with pytest.raises(UserError, match="inputs: there are none"):
        next(read_documents([]))


def test_txt_by_line_and_by_paragraph(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\ufeff\n one\r\ntwo \r\n\r\n \n\nthree\nfour".encode())
    lines = [d for d in read_part(Part(str(file)), Reading(txt="line")) if isinstance(d, Document)]
    assert [d.text for d in lines] == [" one", "two ", "three", "four"]
    assert [d.id for d in lines] == [f"{file}:{n}" for n in (2, 3, 7, 8)]
    paragraphs = list(read_part(Part(str(file)), Reading(txt="paragraph")))
    assert paragraphs == [Document(f"{file}:2", " one\ntwo "), Document(f"{file}:7", "three\nfour")]


def test_what_is_no_document_is_told_and_the_rest_comes(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}',
        b'{"text": "\xe9"}',
        b'{"text": ""}',
        b'{"text": null}',
        b'{"body": 1}',
        b'{"text": "\\u0000"}',
        b'{"text": "\0"}',
        b'{"text": "\\uD83D"}',
        b'{"text": "' + b"x" * 100 + b'"}',
        b"[" * 90,
        b'{"text": "b", "id": "\\udc00"}',
    ]
    file = write(tmp_path / "a.jsonl", b"\n".join(lines))
    items = list(read_part(Part(str(file)), Reading(max_document_bytes=90)))
    kinds = [item.kind if isinstance(item, Skipped) else item for item in items]
    skipped = ["encoding", "empty", "column", "column", "nul", "json", "encoding", "too_long", "json"]
    assert kinds == [Document(f"{file}:1", "a"), *skipped, Document("\\udc00", "b")]
    assert [item.where for item in items if isinstance(item, Skipped)] == [f"{file}:{n}" for n in range(2, 11)]
    assert str(items[4]) == f"{file}:5: no string \"text\" (found: keys 'body')"


def test_a_txt_file_that_is_too_long_is_no_document(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"x" * 101)
    reading = Reading(max_document_bytes=100)
    (skipped,) = read_part(Part(str(file)), reading)
    assert isinstance(skipped, Skipped) and "read the file line by line or by paragraphs" in skipped.reason
    write(file, b"x" * 100)
    assert list(read_part(Part(str(file)), reading)) == [Document(str(file), "x" * 100)]


def test_a_file_without_documents_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (skipped,) = read_part(Part(str(write(tmp_path / name, b""))), Reading(txt="line"))
        assert (skipped, skipped.kind) == (Skipped(str(tmp_path / name), "the file has no documents", "empty"), "empty")


def test_a_part_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.jsonl: cannot be read: No such file"):
        list(read_part(Part(str(tmp_path / "gone.jsonl"))))
    with pytest.raises(UserError, match="a.bin: is not a kind of file"):
        list(read_part(Part(str(tmp_path / "a.bin"))))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="folder.txt: cannot be read: Is a directory"):
        list(read_part(Part(str(tmp_path / "folder.txt"))))


def test_the_line_of_a_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b"one\ntwo\nthree")
    assert [with_line(f"{file}@{n}") for n in (0, 4, 8)] == [f"{file}:{n}" for n in (1, 2, 3)]
    assert with_line("a@7") == "a@7" and with_line("gone.txt@7") == "gone.txt@7" and with_line("a.txt:3") == "a.txt:3"


def test_real_corpora(shared_data: Path) -> None:
    novels = list(read_documents([shared_data / "corpora/novels"]))
    assert len(novels) == 5
    assert not any(d.text.startswith("\ufeff") or "\r\n" in d.text for d in novels)
    assert novels[0].text.startswith("THE SECRET GARDEN\n")
    peps = list(read_documents([shared_data / "corpora/peps_slice.jsonl"]))
    assert (len(peps), peps[0].id) == (148, "pep-0001.rst")
    first = (shared_data / "corpora/peps_slice.jsonl").read_text().split("\n", 1)[0]
    assert peps[0].text == json.loads(first)["text"]
