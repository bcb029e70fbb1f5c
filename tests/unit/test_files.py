"""Files are whole or not there, and a damaged one is told from a whole one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llama_dist import files
from llama_dist.files import BLOCK, HashingFile, append_lines, check_file, read_json_lines, write_file


def test_a_hashing_file_knows_the_size_and_checksum_of_what_it_wrote(tmp_path: Path) -> None:
    numbers = np.arange(1000, dtype=np.float32).reshape(10, 100)
    with HashingFile(tmp_path / "a") as file:
        file.write(b"head")
        file.write(numbers)
        file.write(b"")
    data = (tmp_path / "a").read_bytes()
    assert data == b"head" + numbers.tobytes()
    assert file.size == len(data) == 4004
    assert file.checksum == xxhash.xxh3_128(data).hexdigest()
    assert check_file(tmp_path / "a", size=file.size, checksum=file.checksum) is None


def test_a_hashing_file_is_on_disk_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or real(handle))
    with HashingFile(tmp_path / "a") as file:
        file.write(b"12345")
    assert synced == [5]


def test_a_hashing_file_never_writes_over_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileExistsError):
        HashingFile(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"


def test_a_write_that_takes_only_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, view: memoryview) -> int:
            return self.file.write(view[:3])

        def __enter__(self) -> None: ...

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

    with HashingFile(tmp_path / "a") as file:
        file._file = Slow(file._file)
        file.write(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert check_file(tmp_path / "a", size=file.size, checksum=file.checksum) is None


def test_write_file_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_file(path, b"first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.HashingFile, "write", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"third")
    monkeypatch.undo()
    assert path.read_bytes() == b"second"
    write_file(path, b"fourth")  # what the failed one left does not stand in the way
    assert path.read_bytes() == b"fourth"
    assert list(tmp_path.iterdir()) == [path]


def test_check_file_names_the_file_and_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytes(range(256)) * (BLOCK // 256 + 10)  # more than one block
    path.write_bytes(data)
    checksum = xxhash.xxh3_128(data).hexdigest()
    assert check_file(path, size=len(data), checksum=checksum) is None
    assert check_file(path, size=len(data) + 1, checksum=checksum) == (
        f"{path}: has {len(data)} bytes, expected {len(data) + 1}"
    )
    for at in (0, BLOCK - 1, BLOCK, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        problem = check_file(path, size=len(data), checksum=checksum)
        assert problem.startswith(f"{path}: xxh3-128 is ")
        assert problem.endswith(f"expected {checksum}")
    assert check_file(tmp_path / "none", size=1, checksum="") == (
        f"{tmp_path / 'none'}: cannot be read: No such file or directory"
    )


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with append_lines(path) as file:
        file.write('{"a": 1}\n')
        file.write('{"a": 2')
    with append_lines(path) as file:
        file.write('{"a": 3}\n')
    with append_lines(path) as file:
        file.write('{"a": 4}\n')
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
    assert path.read_text().count("\n") == 4


def test_only_objects_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'1\n"x"\n[]\n{"a": "\xff"}\nnull\n\n{"b": 2}')
    assert [sorted(line) for line in read_json_lines(tmp_path / "lines")] == [["a"], ["b"]]
