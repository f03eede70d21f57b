"""Compares two clients of object stores, obstore and fsspec (s3fs), on a server on the loopback.

    python scripts/benchmarks/object_clients.py

Measures small range reads one after another, many range reads at once, and whole objects of 128 MiB. s3fs is not a
dependency of this package: install it into an environment of its own, with obstore and moto[server]. Next to each
client, the processor time of this process is shown; the server runs in another process.
"""

import asyncio
import logging
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

SMALL, WHOLE = 128 << 10, 128 << 20
"""Bytes of a latent of 128x128, and of a shard."""
READS, THREADS = 300, 16
"""Range reads of each measurement, and threads or tasks that make them at once."""


def serve(answer: Connection) -> None:
    """A small S3 server for GET, with ranges: as fast as Python allows, so that the client is what is measured."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    data = os.urandom(WHOLE)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(b"", WHOLE, 200)

        def do_GET(self) -> None:
            span = self.headers.get("Range")
            start, _, end = (span or f"bytes=0-{WHOLE - 1}").removeprefix("bytes=").partition("-")
            body = memoryview(data)[int(start) : min(int(end or WHOLE), WHOLE - 1) + 1]
            self.reply(body, len(body), 206 if span else 200, f"bytes {start}-{int(start) + len(body) - 1}/{WHOLE}")

        def reply(self, body: bytes | memoryview, size: int, status: int, span: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
            self.send_header("Last-Modified", "Thu, 26 Nov 2026 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", span)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answer.send(server.server_port)
    server.serve_forever()


def measure(what: str, action: Callable[[], int]) -> None:
    """Prints reads or MB a second of the median of three, and the processor time of one."""
    action()
    seconds, cpu = [], []
    for _ in range(3):
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        size = action()
        seconds.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    took, reads = statistics.median(seconds), size // SMALL if size < WHOLE else 1
    each = statistics.median(cpu) / reads * 1e3
    print(f"{what:32} {reads / took:8.0f} /s {size / took / 1e6:8.0f} MB/s   cpu {each:7.2f} ms each")


def main() -> None:
    """Measures both clients against one server."""
    logging.disable(logging.CRITICAL)
    own, other = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{own.recv()}"
    os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1")

    import obstore
    from obstore.store import S3Store

    store = S3Store("bucket", endpoint=url, client_options={"allow_http": True})
    starts = [number * SMALL % (WHOLE - SMALL) for number in range(READS)]

    def read(start: int) -> int:
        return len(obstore.get_range(store, "x", start=start, length=SMALL))

    measure("obstore, one after another", lambda: sum(map(read, starts)))
    with ThreadPoolExecutor(THREADS) as pool:
        measure(f"obstore, {THREADS} threads", lambda: sum(pool.map(read, starts)))
    measure("obstore, whole object", lambda: len(obstore.get(store, "x").bytes()))

    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=url)
    measure(
        "s3fs, one after another", lambda: sum(len(files.cat_file("bucket/x", start=a, end=a + SMALL)) for a in starts)
    )
    with ThreadPoolExecutor(THREADS) as pool:
        ranged = lambda a: len(files.cat_file("bucket/x", start=a, end=a + SMALL))  # noqa: E731
        measure(f"s3fs, {THREADS} threads", lambda: sum(pool.map(ranged, starts)))

    def gathered() -> int:
        async def all_of_them() -> int:
            other = s3fs.S3FileSystem(endpoint_url=url, asynchronous=True, skip_instance_cache=True)
            limit = asyncio.Semaphore(THREADS)

            async def one(start: int) -> int:
                async with limit:
                    return len(await other._cat_file("bucket/x", start=start, end=start + SMALL))

            return sum(await asyncio.gather(*map(one, starts)))

        return asyncio.run(all_of_them())

    measure(f"s3fs, asyncio, {THREADS} tasks", gathered)
    measure("s3fs, whole object", lambda: len(files.cat_file("bucket/x")))
    server.terminate()


if __name__ == "__main__":
    main()
