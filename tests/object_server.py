"""An S3 server on the loopback interface, in a process of its own, and a gate before it that can be shut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest import mock

import fsspec

BUCKET = "checkpoints"
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until whoever started it closes the pipe or ends
"""


class Gate:
    """Passes connections on to `port`; shut, it ends them all and takes no more, as a server does that has died."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._shut, self._allowance = False, float("inf")
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def open(self) -> None:
        self._shut, self._allowance = False, float("inf")

    def shut(self, *, after: int = 0) -> None:
        """Shut when `after` more bytes have come from clients."""
        if after:
            self._allowance = after
            return
        self._shut = True
        with self._lock:
            ended, self._open = self._open, set()
        for one in ended:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @property
    def is_shut(self) -> bool:
        return self._shut

    def close(self) -> None:
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._shut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._upstream))
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        self._allowance -= len(data)
                    if self._allowance < 0:
                        self.shut()
                        break
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class ObjectServer:
    """`url` is of an empty bucket, for processes that have `environment`; what they send goes through `gate`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.gate = Gate(int(self._process.stdout.readline()))
        self.url = f"s3://{BUCKET}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.gate.port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_MAX_ATTEMPTS": "1",  # s3fs tries again by itself
        }
        with mock.patch.dict(os.environ, self.environment):
            self.files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
            self.files.mkdir(BUCKET)

    def uploads(self) -> list[str]:
        """The keys of uploads in parts that were neither completed nor ended."""
        return [upload["Key"] for upload in self.files.list_multipart_uploads(BUCKET)]

    def end(self) -> None:
        self.gate.close()
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """A server until the block ends, in whose environment this process is meanwhile."""
    server = ObjectServer()
    # File systems are kept by their arguments, and where the server is stands in the environment.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with mock.patch.dict(os.environ, server.environment):
            yield server
    finally:
        server.end()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
