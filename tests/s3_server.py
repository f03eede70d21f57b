"""A real S3 server on the loopback (moto), which counts requests, and a proxy that breaks connections."""

import contextlib
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "KEY-THAT-NOBODY-SEES",
    "AWS_SECRET_ACCESS_KEY": "secret-that-nobody-sees",
    "AWS_REGION": "us-east-1",
}


class S3Server:
    """The server, on a free port. `requests` counts the requests by method, since the last `clear`."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.requests: Counter[str] = Counter()
        """Requests by method."""
        self.paths: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.hold: threading.Event | None = None
        """While this event is not set, writes wait before they are carried out."""
        self.held = threading.Event()
        """Set as soon as a write waits."""
        app = DomainDispatcherApplication(create_backend_app)

        def counted(environment: dict[str, Any], start: Any) -> Any:
            self.requests[environment["REQUEST_METHOD"]] += 1
            self.paths.append((environment["REQUEST_METHOD"], environment["PATH_INFO"]))
            if environment["REQUEST_METHOD"] == "PUT" and (hold := self.hold):
                self.held.set()
                hold.wait(60)
            return app(environment, start)

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_arguments: Any) -> None:
                pass

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.create(BUCKET)

    def create(self, bucket: str) -> None:
        """Makes a bucket."""
        with urlopen(Request(f"{self.url}/{quote(bucket)}", method="PUT", headers={"Host": "localhost"})):
            pass

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Within the context, writes wait until `hold` is set, or until its end."""
        self.hold = hold = threading.Event()
        self.held.clear()
        try:
            yield
        finally:
            hold.set()
            self.hold = None

    def clear(self) -> None:
        self.requests.clear()
        self.paths.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def environment(port: int) -> dict[str, str]:
    """The environment of a program that uses the server on this port."""
    return CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


class Proxy:
    """Passes connections on to a port. `limit` bytes of each answer pass, then it is dropped or stalled.

    The first `faults` connections are broken, and the later ones are whole.
    """

    def __init__(self, port: int, *, faults: int, limit: int, stall: bool = False) -> None:
        self.faults, self.connections = faults, 0
        self._target, self._limit, self._stall = port, limit, stall
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broken = self.connections < self.faults
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, broken), daemon=True).start()

    def _serve(self, client: socket.socket, broken: bool) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
            self._copy(server, client, self._limit if broken else None)

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if limit is not None:
                    data, limit = data[:limit], limit - len(data)
                if data:
                    target.sendall(data)
                if limit is not None and limit <= 0:
                    if self._stall:
                        self._closed.wait(60)
                    break
            for side in (source, target):
                side.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._listener.close()


@contextlib.contextmanager
def running_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        yield server
    finally:
        server.close()
