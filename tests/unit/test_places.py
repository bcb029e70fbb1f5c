"""Both kinds of places keep one contract: all or nothing of a checkpoint, whatever fails, and only what is asked for."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import xxhash
from object_server import ObjectServer, object_server

from llama_dist.boxes import Box
from llama_dist.checkpoint import object_place
from llama_dist.checkpoint.object_place import ObjectPlace
from llama_dist.checkpoint.places import LocalPlace, Place
from llama_dist.checkpoint.store import newest_valid, open_place, read_checkpoint, seal, verify
from llama_dist.errors import UserError

NAME = "step-00000300"
ARRAY = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
HEAD = 12  # bytes before the array in the file


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with object_server() as running:
        yield running


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return LocalPlace(tmp_path)
    root = "s3://checkpoints" if request.param == "s3" else "memory://"
    if request.param == "s3":
        request.getfixturevalue("server")
    return ObjectPlace(f"{root}/{tmp_path.name}/run")


@pytest.fixture
def bucket(server: ObjectServer, tmp_path: Path) -> ObjectPlace:
    return ObjectPlace(f"{server.url}/{tmp_path.name}")


def begun(place: Place, name: str, attempt: int) -> str:
    draft = place.draft(name, attempt)
    place.begin(draft)
    return draft


def write(place: Place, name: str = NAME, *, attempt: int = 7, content: bytes = b"content", files: int = 1) -> str:
    """A draft with `files` files."""
    draft = begun(place, name, attempt)
    for rank in range(files):
        with place.create(draft, f"rank-0000{rank}.bin") as file:
            file.write(content)
    return draft


def save(place: Place, name: str = NAME, *, attempt: int = 7, content: bytes = b"content", files: int = 1) -> None:
    draft = write(place, name, attempt=attempt, content=content, files=files)
    place.commit(draft, name, b'{"manifest of": "%b"}' % content)


def content_of(place: Place, name: str = NAME) -> bytes:
    """The first file, whose length is one float's times a few."""
    box = Box((0,), (1,))
    into = torch.empty(1)
    place.read_box(name, "rank-00000.bin", 0, (1,), box, into)
    return into.numpy().tobytes()


def keys(place: ObjectPlace) -> list[str]:
    return sorted(key.removeprefix(place._root + "/") for key in place._files.find(place._root))


# The contract.


def test_a_draft_is_nothing_until_it_is_committed(place: Place) -> None:
    assert place.names() == [] and place.sweep() == []
    draft = write(place)
    assert place.names() == []
    with pytest.raises(OSError, match=NAME):
        place.manifest(NAME)
    manifest = b'{\n "a": "\xc3\xa9}",\n "b": {}\n}\n'
    place.commit(draft, NAME, manifest)
    assert place.names() == [NAME]
    assert place.manifest(NAME) == manifest


def test_names_are_by_step_and_of_checkpoints_only(place: Place) -> None:
    for name in ("step-00000099", "step-100000000", "step-00000100"):
        save(place, name)
    write(place, "step-00000400")
    assert place.names() == ["step-100000000", "step-00000100", "step-00000099"]


def test_what_is_written_is_hashed_and_read_by_boxes(place: Place) -> None:
    draft = begun(place, NAME, 1)
    with place.create(draft, "rank-00000.bin") as file:
        file.write(b"x" * HEAD)
        file.write(ARRAY)
        file.write(ARRAY[2:3])
    whole = b"x" * HEAD + ARRAY.tobytes() + ARRAY[2:3].tobytes()
    assert (file.size, file.checksum) == (len(whole), xxhash.xxh3_128_hexdigest(whole))
    place.commit(draft, NAME, b"{}")
    for box in (Box((0, 0), (6, 10)), Box((2, 0), (3, 10)), Box((1, 3), (4, 5)), Box((5, 9), (1, 1))):
        into = torch.full(box.shape, -1.0)
        place.read_box(NAME, "rank-00000.bin", HEAD, (6, 10), box, into)
        assert np.array_equal(into.numpy(), ARRAY[box.slices]), box
    flat = torch.empty(7)
    place.read_box(NAME, "rank-00000.bin", HEAD, (60,), Box((11,), (7,)), flat)
    assert flat.tolist() == list(range(11, 18))
    with pytest.raises(OSError, match="rank-00000.bin"):
        place.read_box(NAME, "rank-00000.bin", HEAD, (8, 10), Box((6, 0), (2, 10)), torch.empty(2, 10))


def test_any_damage_is_told(place: Place) -> None:
    save(place, content=b"content")
    good = {"size": 7, "checksum": xxhash.xxh3_128_hexdigest(b"content")}
    assert place.check(NAME, "rank-00000.bin", **good) is None
    assert place.check(NAME, "rank-00000.bin", size=7, checksum=None) is None
    for told, file, wrong in (
        ("has 7 bytes, expected 8", "rank-00000.bin", good | {"size": 8}),
        ("has 7 bytes, expected 6", "rank-00000.bin", good | {"size": 6}),
        (f"xxh3-128 is {good['checksum']}, expected {'0' * 32}", "rank-00000.bin", good | {"checksum": "0" * 32}),
        ("cannot be read", "rank-00001.bin", good),
        ("cannot be read", "rank-00001.bin", good | {"checksum": None}),
    ):
        problem = place.check(NAME, file, **wrong)
        assert problem.startswith(f"{place.where}/{NAME}") and f"{file}: {told}" in problem


@pytest.mark.parametrize("attempt", [7, 8])
def test_a_checkpoint_is_replaced_by_one_of_its_name(place: Place, attempt: int) -> None:
    save(place, content=b"old!", files=2)
    draft = write(place, attempt=attempt, content=b"new!")
    assert content_of(place) == b"old!", "a draft changes nothing"
    place.commit(draft, NAME, b'{"new": 1}')
    assert (content_of(place), place.manifest(NAME), place.names()) == (b"new!", b'{"new": 1}', [NAME])
    assert place.check(NAME, "rank-00001.bin", size=4, checksum=None), "files of the old one are not files of the new"


def test_a_failed_write_leaves_no_file_and_the_error_is_the_writers(place: Place) -> None:
    save(place, "step-00000200", content=b"old!")
    draft = begun(place, NAME, 7)
    with pytest.raises(ZeroDivisionError), place.create(draft, "rank-00000.bin") as file:
        file.write(b"part")
        raise ZeroDivisionError
    place.abandon(draft)
    place.abandon(draft)
    assert place.names() == ["step-00000200"]
    save(place, content=b"next")  # the same attempt comes back to this step
    assert content_of(place) == b"next"


def test_discarding_and_sweeping_delete_what_they_should_and_nothing_else(place: Place) -> None:
    for step in (100, 200, 300):
        save(place, f"step-00000{step}", attempt=1)
    write(place, "step-00000300", attempt=12)
    write(place, "step-00000400", attempt=1)
    place.discard("step-00000200")
    assert place.names() == ["step-00000300", "step-00000100"]
    with pytest.raises(OSError):
        place.manifest("step-00000200")
    assert place.sweep() == []
    assert place.names() == ["step-00000300", "step-00000100"]
    assert content_of(place, "step-00000300") == content_of(place, "step-00000100") == b"cont"


# Of object stores alone.


def test_the_manifest_is_the_last_key_and_names_its_attempt(bucket: ObjectPlace) -> None:
    write(bucket, attempt=7, files=2)
    assert keys(bucket) == [f"{NAME}/attempt-7/rank-0000{rank}.bin" for rank in (0, 1)]
    save(bucket, attempt=70, content=b"other")
    write(bucket, attempt=7)
    write(bucket, attempt=70)
    write(bucket, "step-00000400", attempt=7)
    files, root = bucket._files, bucket._root
    files.pipe_file(f"{root}/notes.txt", b"mine")
    files.pipe_file(f"{root}/step-00000400/notes.txt", b"mine")
    stored = files.cat_file(f"{root}/{NAME}/MANIFEST.json")
    assert stored == b'{"folder": "attempt-70", "manifest": {"manifest of": "other"}}'
    assert ObjectPlace(bucket.where).sweep() == []
    assert keys(bucket) == ["notes.txt", f"{NAME}/MANIFEST.json", f"{NAME}/attempt-70/rank-00000.bin", "step-00000400/notes.txt"]


def test_an_attempt_that_comes_back_to_a_step_never_writes_over_its_committed_files(bucket: ObjectPlace) -> None:
    save(bucket, content=b"one!")
    draft = write(bucket, content=b"part")
    assert content_of(bucket) == b"one!"
    bucket.abandon(draft)
    assert content_of(bucket) == b"one!"
    with pytest.raises(OSError, match=f"{bucket.where}/{NAME}/attempt-7: holds a checkpoint"):
        write(ObjectPlace(bucket.where), content=b"part")  # which cannot count what was written before it
    save(bucket, content=b"two!")
    assert content_of(bucket) == content_of(ObjectPlace(bucket.where)) == b"two!"
    assert len(keys(bucket)) == 2, "what was replaced is deleted"


def test_ranks_name_a_draft_alike_and_none_twice(bucket: ObjectPlace) -> None:
    ranks = [ObjectPlace(bucket.where), ObjectPlace(bucket.where)]
    drafts = [[rank.draft(NAME, 7), rank.draft("step-00000400", 7), rank.draft(NAME, 7), rank.draft(NAME, 8)] for rank in ranks]
    assert drafts[0] == drafts[1]
    assert len(set(drafts[0])) == 4


def test_discarding_begins_with_the_manifest(bucket: ObjectPlace, server: ObjectServer) -> None:
    save(bucket, files=3)
    deleted: list[str] = []
    delete_one = bucket._files.rm_file

    def first(path: str) -> None:
        deleted.append(path.rpartition("/")[2])
        delete_one(path)

    def denied(path: str, recursive: bool) -> None:
        raise PermissionError("Access Denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket._files, "rm_file", first)
        patch.setattr(bucket._files, "rm", denied)
        with pytest.raises(OSError, match=f"{bucket.where}/{NAME}/attempt-7: cannot be deleted: Access Denied"):
            bucket.discard(NAME)
        (problem,) = bucket.sweep()
    assert problem == f"{bucket.where}/{NAME}/attempt-7: cannot be deleted: Access Denied"
    assert deleted == ["MANIFEST.json"] and bucket.names() == []
    assert len(keys(bucket)) == 3
    assert bucket.sweep() == [] and keys(bucket) == []


def test_objects_that_silently_stay_are_told(bucket: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: object, paths: list[str], **kwargs: object) -> list[str]:
        return []

    save(bucket, files=3)
    monkeypatch.setattr(type(bucket._files), "_bulk_delete", nothing)  # what s3fs makes of keys it may not delete
    with pytest.raises(OSError, match="3 objects are still there"):
        bucket.discard(NAME)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"folder": "attempt-7", "manifest": {"a": 1', b'{"folder": "../x", "manifest": {}}'])
def test_a_damaged_manifest_is_told_and_no_reason_to_delete(bucket: ObjectPlace, damage: bytes) -> None:
    save(bucket)
    bucket._files.pipe_file(bucket._path(f"{NAME}/MANIFEST.json"), damage)
    fresh = ObjectPlace(bucket.where)
    with pytest.raises(ValueError, match=f"{bucket.where}/{NAME}/MANIFEST.json: cannot be read"):
        read_checkpoint(fresh, NAME)
    assert fresh.sweep() == []
    assert f"{NAME}/attempt-7/rank-00000.bin" in keys(bucket)


def test_large_files_go_in_parts_of_one_size_and_bounded_memory(
    bucket: ObjectPlace, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_place, "PART", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(object_place, "RANGE", 1 << 20)
    monkeypatch.setattr(object_place, "BLOCK", 1 << 20)
    array = np.random.default_rng(0).random((4096, 1250), dtype=np.float32)  # 20 MB, four parts
    draft = begun(bucket, NAME, 1)
    tracemalloc.start()
    try:
        with bucket.create(draft, "rank-00000.bin") as file:
            for rows in np.split(array, 2):
                file.write(rows)
        written = tracemalloc.get_traced_memory()[1]
        bucket.commit(draft, NAME, b"{}")
        parts = server.files.info(bucket._path(f"{draft}/rank-00000.bin"))["ETag"].strip('"').rpartition("-")[2]
        assert parts == str(-(-array.nbytes // (5 << 20)))
        narrow, into = Box((0, 600), (4096, 5)), torch.empty(4096, 5)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        bucket.read_box(NAME, "rank-00000.bin", 0, array.shape, narrow, into)
        assert bucket.check(NAME, "rank-00000.bin", size=array.nbytes, checksum=file.checksum) is None
        read = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert np.array_equal(into.numpy(), array[narrow.slices])
    assert written < array.nbytes, "never all of the file is in memory"
    assert read < array.nbytes // 2


@pytest.mark.parametrize("size", [100, 6 << 20])
def test_an_upload_that_breaks_off_leaves_no_object_and_no_upload(
    bucket: ObjectPlace, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(object_place, "PART", 5 << 20)
    draft = begun(bucket, NAME, 1)
    with pytest.raises(ZeroDivisionError), bucket.create(draft, "rank-00000.bin") as file:
        file.write(np.zeros(size, dtype=np.uint8))
        assert bool(server.uploads()) == (size > object_place.PART), "of a large one a part is there already"
        raise ZeroDivisionError
    del file
    gc.collect()  # fsspec completes the upload of a file that nobody closed
    assert keys(bucket) == [] and server.uploads() == []


def test_an_object_that_arrives_short_is_told_and_deleted(bucket: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = begun(bucket, NAME, 1)
    monkeypatch.setattr(bucket._files, "info", lambda path: {"size": 3})
    told = f"{bucket.where}/{draft}/rank-00000.bin: cannot be written: 3 bytes arrived of 7"
    with pytest.raises(OSError, match=told), bucket.create(draft, "rank-00000.bin") as file:
        file.write(b"content")
    assert keys(bucket) == []


def test_what_another_process_commits_is_seen(bucket: ObjectPlace, server: ObjectServer) -> None:
    save(bucket)
    assert bucket.names() == [NAME]
    server.files.pipe_file(bucket._path("step-00000400/MANIFEST.json"), b"")  # a client that this process's knows nothing of
    assert bucket.names() == ["step-00000400", NAME]


def test_a_store_that_is_gone_is_an_error_with_the_url_and_when_back_all_is_there(
    bucket: ObjectPlace, server: ObjectServer
) -> None:
    save(bucket, content=b"old!")
    draft = begun(bucket, "step-00000400", 7)
    url = f"{bucket.where}/step-00000400/attempt-7/rank-00000.bin"
    server.gate.shut()
    try:
        with pytest.raises(OSError, match=f"{url}: cannot be written: "), bucket.create(draft, "rank-00000.bin") as file:
            file.write(b"new!")
        with pytest.raises(OSError, match=f"{bucket.where}/: cannot be listed: "):
            bucket.names()  # and not an empty list, which would be a fresh start
        assert f"{bucket.where}/{NAME}/attempt-7/rank-00000.bin: cannot be read: " in bucket.check(
            NAME, "rank-00000.bin", size=4, checksum=None
        )
        bucket.abandon(draft)
    finally:
        server.gate.open()
    assert bucket.names() == [NAME] and content_of(bucket) == b"old!"
    save(bucket, "step-00000400", content=b"new!")
    assert content_of(bucket, "step-00000400") == b"new!"


def test_a_bucket_that_is_not_there_and_keys_that_are_wrong(server: ObjectServer) -> None:
    place = ObjectPlace("s3://no-such-bucket/run")
    assert place.names() == [] and place.sweep() == []  # as a folder that is not there yet
    with pytest.raises(OSError, match="s3://no-such-bucket/run/step-00000300/attempt-7/rank-00000.bin: cannot be written: no such object or bucket"):
        write(place)


def test_threads_and_forks_share_a_place(bucket: ObjectPlace) -> None:
    save(bucket, "step-00000100")
    errors: list[BaseException] = []

    def in_thread(name: str) -> None:
        try:
            save(bucket, name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=in_thread, args=(f"step-0000020{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == [] and len(bucket.names()) == 5
    child = os.fork()
    if child == 0:
        os._exit(0 if len(bucket.names()) == 5 and content_of(bucket, "step-00000100") == b"cont" else 1)
    assert waits_for(child) == 0


def waits_for(child: int, seconds: float = 20.0) -> int:
    """The exit status of a child, which is killed if it hangs."""
    timer = threading.Timer(seconds, os.kill, (child, 9))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    return status


def test_paths_and_urls_are_told_apart(tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_place(f"{server.url}/x/"), ObjectPlace) and open_place(f"{server.url}/x/").where == f"{server.url}/x"
    assert isinstance(open_place(tmp_path), LocalPlace) and isinstance(open_place(str(tmp_path)), LocalPlace)
    local = open_place(f"file://{tmp_path}")
    assert isinstance(local, LocalPlace) and local.where == str(tmp_path)
    for url, told in (("http://127.0.0.1/x", "web server"), ("nothing://x", "nothing")):
        with pytest.raises(UserError, match=f"{url}: checkpoints cannot be kept.*{told}"):
            open_place(url)

    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=f"{server.url}: .*Install s3fs"):
        open_place(server.url)


def truncated(place: ObjectPlace, key: str) -> None:
    content = place._files.cat_file(place._path(key))
    place._files.pipe_file(place._path(key), content[:-1])


def flipped(place: ObjectPlace, key: str) -> None:
    content = bytearray(place._files.cat_file(place._path(key)))
    content[-1] ^= 1
    place._files.pipe_file(place._path(key), bytes(content))


def removed(place: ObjectPlace, key: str) -> None:
    place._files.rm_file(place._path(key))


@pytest.mark.parametrize(
    ("damage", "told"), [(truncated, "has 6 bytes, expected 7"), (flipped, "xxh3-128 is"), (removed, "cannot be read: no such object")]
)
def test_the_newest_that_verifies_is_found_behind_a_url(
    bucket: ObjectPlace, damage: Callable[[ObjectPlace, str], None], told: str
) -> None:
    assert newest_valid(bucket) == (None, [])
    record = {"bytes": 7, "xxh3_128": xxhash.xxh3_128_hexdigest(b"content")}
    for step in (100, 200):
        draft = write(bucket, f"step-00000{step}")
        bucket.commit(draft, f"step-00000{step}", seal({"step": step, "samples": 0, "files": {"rank-00000.bin": record}}))
    write(bucket, "step-00000300")
    checkpoint, passed_over = newest_valid(bucket)
    assert (str(checkpoint), passed_over) == (f"{bucket.where}/step-00000200", [])
    damage(bucket, "step-00000200/attempt-7/rank-00000.bin")
    url = f"{bucket.where}/step-00000200/attempt-7/rank-00000.bin"
    (problem,) = verify(checkpoint)
    assert problem.startswith(f"{url}: ") and told in problem
    checkpoint, passed_over = newest_valid(open_place(bucket.where))
    assert checkpoint.position.step == 100 and passed_over == [problem]
    damage(bucket, "step-00000100/attempt-7/rank-00000.bin")
    with pytest.raises(UserError, match=f"{bucket.where}: none of its 2 checkpoints verifies"):
        newest_valid(bucket)
