"""A server that gives scripted answers, for clients that must do with any server."""

import gzip
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.hooked import WAIT_S


@contextmanager
def scripted_server(answers: Iterable[tuple[int, dict[str, str], object]], asked: list[Any]) -> Iterator[str]:
    """Serves at the URL that it gives, compressed where a client accepts that, and breaks off when the answers are used up.

    Args:
        answers: Status, headers and body of each answer; a body that is not text or bytes is sent as JSON.
        asked: Takes the path of every GET and the JSON body of every POST.
    """
    left = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self._answer()

        def do_POST(self) -> None:
            assert self.path == "/rollout/generate"
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer()

        def _answer(self) -> None:
            status, headers, body = next(left, (None, {}, b""))
            if status is None:
                return
            if isinstance(body, str):
                body = body.encode()
            elif not isinstance(body, bytes):
                body = json.dumps(body, separators=(",", ":")).encode()
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                body, headers = gzip.compress(body), {"Content-Encoding": "gzip", **headers}
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(WAIT_S)
