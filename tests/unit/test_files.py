"""Files are whole or not there, and a damaged one is told from a whole one."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llama_dist import files
from llama_dist.files import (
    BLOCK,
    DIRECT_FROM,
    SECTOR,
    HashingFile,
    aligned_memory,
    append_lines,
    check_file,
    read_json_lines,
    write_file,
)


class Wrapped:
    """A raw file of which a test changes what `write` does."""

    def __init__(self, file: object, write: Callable[[object, memoryview], int]) -> None:
        self.file = file
        self._write = write

    def write(self, view: memoryview) -> int:
        return self._write(self.file, view)

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()


def is_direct(file: object) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def large(seed: int, size: int) -> memoryview:
    """Random bytes in aligned memory."""
    memory = memoryview(aligned_memory(size))
    memory[:] = np.random.default_rng(seed).bytes(size)
    return memory


def write_mixed(path: Path, *, wrap: Callable[[object, memoryview], int] | None = None) -> HashingFile:
    """Large and small writes, on sectors and between them, with what is in the file checked."""
    tail, odd = large(2, DIRECT_FROM + SECTOR + 77), large(3, 2 * DIRECT_FROM)
    parts = [large(1, 2 * DIRECT_FROM), b"x" * SECTOR, tail, b"y" * (SECTOR - 77), odd, b"z", odd, odd[5:]]
    with HashingFile(path) as file:
        if wrap is not None:
            file._file = Wrapped(file._file, wrap)
        for part in parts:
            file.write(part)
    expected = b"".join(bytes(part) for part in parts)
    assert path.read_bytes() == expected
    assert file.size == len(expected)
    assert file.checksum == xxhash.xxh3_128(expected).hexdigest()
    return file


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


def test_a_write_that_takes_only_a_part_is_continued(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "a") as file:
        file._file = Wrapped(file._file, lambda raw, view: raw.write(view[:3]))
        file.write(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert check_file(tmp_path / "a", size=file.size, checksum=file.checksum) is None


def test_large_aligned_writes_go_past_the_page_cache_and_others_do_not(tmp_path: Path) -> None:
    modes: list[tuple[bool, int]] = []

    def write(file: object, view: memoryview) -> int:
        written = file.write(view)
        modes.append((is_direct(file), written))
        return written

    file = write_mixed(tmp_path / "a", wrap=write)
    if not file._can_be_direct and not any(direct for direct, _ in modes):
        pytest.skip("this file system has no direct writes")
    assert [size for direct, size in modes if direct] == [2 * DIRECT_FROM, DIRECT_FROM + SECTOR, 2 * DIRECT_FROM]
    assert sum(size for direct, size in modes if not direct) == SECTOR + 77 + SECTOR - 77 + 1 + 4 * DIRECT_FROM - 5


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes")
def test_where_direct_writes_are_refused_others_take_their_place(tmp_path: Path) -> None:
    def write(file: object, view: memoryview) -> int:
        if is_direct(file):
            raise OSError(errno.EINVAL, "Invalid argument")
        return file.write(view)

    write_mixed(tmp_path / "a", wrap=write)

    def short(file: object, view: memoryview) -> int:  # as on a disk that is nearly full
        return file.write(view[: len(view) // 2 + 1 if len(view) > SECTOR else None])

    write_mixed(tmp_path / "b", wrap=short)


def test_unaligned_memory_is_written_too(tmp_path: Path) -> None:
    data = large(1, 2 * DIRECT_FROM + 8)[8:]
    with HashingFile(tmp_path / "a") as file:
        file.write(data)
        file.write(data)
    assert (tmp_path / "a").read_bytes() == bytes(data) * 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_direct_write_that_fails_is_not_tried_in_another_way(tmp_path: Path, number: int) -> None:
    def fail(file: object, view: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        write_mixed(tmp_path / "a", wrap=fail)


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    """Of the real system: a file may not grow beyond a limit."""
    size = 4 * DIRECT_FROM
    script = (
        "import resource, signal, sys, pathlib\n"
        "from llama_dist.files import HashingFile, aligned_memory\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2 + 100},) * 2)\n"
        "try:\n"
        "    with HashingFile(pathlib.Path(sys.argv[1])) as file:\n"
        f"        file.write(aligned_memory({size}))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    repo = Path(files.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr


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
    assert check_file(path, size=len(data), checksum=None) is None
    assert check_file(path, size=len(data) - 1, checksum=None).endswith(f"expected {len(data) - 1}")
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
