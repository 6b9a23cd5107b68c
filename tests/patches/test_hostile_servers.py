"""Patch folders behind a URL whose server means harm."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.patches.conftest import soon
from xpatch.errors import FormatError
from xpatch.patches import store
from xpatch.patches.limits import Limits
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers every request with bytes that do not stop, whatever range was asked for."""

    sent = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while Endless.sent < 1 << 30:
                Endless.sent += self.wfile.write(b"[" * 65536)
        except OSError:
            pass

    def log_message(self, *words: Any) -> None: ...


def test_a_server_that_does_not_stop() -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with soon(20), pytest.raises(FormatError, match="limit 'config_bytes'"):
            store.load(f"http://127.0.0.1:{server.server_port}/x", limits=Limits(config_bytes=1 << 20))
        server.shutdown()
    assert Endless.sent < 64 << 20


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(FormatError, match=f"{address}/patch_config.json: expected a"):
        store.load(address)


def test_too_large_behind_a_url(make_set: MakeSet) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = str(store.save(make_set(["a"]), "memory://hostile/x"))
    fsspec.filesystem("memory").pipe_file(f"/hostile/x/{store.TENSOR_FILE}", b"\0" * (9 << 20))
    with pytest.raises(FormatError, match="limit 'header_bytes'"):
        store.load(url)
