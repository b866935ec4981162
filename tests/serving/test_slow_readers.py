"""A client that does not read its answer costs nobody else anything, and is let go."""

import json
import socket
import time
from urllib.parse import urlsplit

from tests.serving.servers import SMALL, serving
from tests.serving.test_hostile import post

# More than the sockets' buffers hold.
LARGE = {
    **SMALL,
    "height": 256,
    "width": 256,
    "num_inference_steps": 30,
    "guidance_scale": 1.0,
    "rollout_return_dit_trajectory": True,
}
TIMEOUT_S = 1.0


def test_a_client_that_never_reads_is_let_go_while_others_are_served(service):
    with serving(service, send_timeout_s=TIMEOUT_S) as others, socket.socket() as silent:
        url = urlsplit(str(others.base_url))
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((url.hostname, url.port))
        body = json.dumps(LARGE).encode()
        silent.sendall(post(b"Content-Length: %d" % len(body), body=body, path=b"/rollout/generate"))
        assert silent.recv(12) == b"HTTP/1.1 200"
        ended_s = time.monotonic() + 3 * TIMEOUT_S
        while time.monotonic() < ended_s:
            assert others.post("/rollout/generate", json=SMALL).status_code == 200
        # Had the server held on to it, the rest would come now.
        assert received(silent) < len(others.post("/rollout/generate", json=LARGE).content) / 2


def test_a_client_that_reads_slowly_gets_all_of_its_answer(service):
    with serving(service, send_timeout_s=TIMEOUT_S) as client:
        with client.stream("POST", "/rollout/generate", json=LARGE) as answer:
            size = 0
            for number, piece in enumerate(answer.iter_raw(chunk_size=2**20)):
                size += len(piece)
                # In all longer than it may take nothing for.
                time.sleep(TIMEOUT_S / 2 if number < 4 else 0)
        assert size == int(answer.headers["content-length"])


def received(connection: socket.socket) -> int:
    """Bytes until the other end breaks off."""
    connection.settimeout(30)
    size = 0
    try:
        while piece := connection.recv(2**20):
            size += len(piece)
    except ConnectionError:
        pass
    return size
