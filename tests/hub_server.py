"""A server that speaks the part of the Hugging Face hub's protocol that uploads and downloads need.

It keeps repositories in memory. It answers the requests that the real client `huggingface_hub` makes without Xet:
repository information, creation, the write check, preupload, the LFS batch, the upload of each object, commits, the
file tree, and downloads with byte ranges. Tests make it fail through its attributes.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_no_file_may_hold"


@dataclass
class Repository:
    """Files by path, and each object by its SHA-256."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server. Within the context it serves at `url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        """SHA-256 of each object whose content a client began to send."""
        self.served: list[tuple[str, int]] = []
        """Path and number of the first byte of each file that was downloaded."""
        self.requests: list[str] = []
        self.status: int | None = None
        """Status that every request is answered with; None for real answers."""
        self.faults: list[int] = []
        """Statuses that the next requests for a repository are answered with."""
        self.object_status = 200
        """Status that the upload of an object is answered with."""
        self.readers: set[str] = set()
        """Repositories that the token may only read."""
        self.hold: threading.Event | None = None
        """The upload of an object stops in its middle until the event is set."""
        self.held = threading.Event()
        """Set once an upload has stopped in its middle."""
        self.lost = threading.Event()
        """Set once a client has closed the connection of a stopped upload."""
        self.most_bytes: int | None = None
        """Bytes after which a download breaks off, once."""
        self.withheld: str | None = None
        """Path of a file whose download is refused."""

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold:
            self.hold.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Says nothing: clients that are killed leave broken connections."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.command == "PUT":  # the signature in the URL stands for the token
            return self.receive_object(path.removeprefix("/objects/"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status:
            return self.reply({"error": "a fault"}, status=self.server.status)
        if self.server.faults and path.startswith("/api/models/"):
            return self.reply({"error": "a fault"}, status=self.server.faults.pop(0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, answer in (
            (r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?", self.info),
            (r"/api/models/([\w.-]+/[\w.-]+)/auth-check(/write)?", self.check),
            (r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self.preupload),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.commit),
            (r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+(?:/(.+))?", self.tree),
            (r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                if match[1] not in self.server.repositories:
                    return self.reply({"error": "Repository not found"}, status=404, code="RepoNotFound")
                return answer(body, *match.groups())
        return self.reply({"error": f"unknown request {path}"}, status=400)

    def reply(self, value: object, *, status: int = 200, code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "user":
            return self.reply({"error": "You don't have the rights"}, status=403)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories[name] = Repository(private)
        return self.reply({"url": f"{self.server.url}/{name}", "name": name})

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        repository = self.server.repositories[name]
        if revision not in (None, "main", repository.sha):
            return self.reply({"error": "Invalid rev id"}, status=404, code="RevisionNotFound")
        files = [{"rfilename": path} for path in repository.files]
        return self.reply({"id": name, "sha": repository.sha, "private": repository.private, "siblings": files})

    def check(self, _: bytes, name: str, write: str | None) -> None:
        forbidden = write and name in self.server.readers
        self.reply({"error": "no write access"} if forbidden else {}, status=403 if forbidden else 200)

    def preupload(self, body: bytes, name: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": file["path"], "uploadMode": "regular" if file["size"] < 1000 else "lfs", "shouldIgnore": False}
            for file in files
        ]
        self.reply({"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{item['oid']}?X-Signature=a-secret-signature"
                item["actions"] = {"upload": {"href": href, "header": {}}}
        self.reply({"objects": objects, "transfer": "basic"})

    def receive_object(self, oid: str) -> None:
        self.server.sent.append(oid)
        size = int(self.headers["Content-Length"])
        content = self.rfile.read(size // 2)
        if self.server.hold:
            self.server.held.set()
            self.server.hold.wait()
        content += self.rfile.read(size - len(content))
        if hashlib.sha256(content).hexdigest() != oid:
            self.server.lost.set()
            self.close_connection = True
            return
        if self.server.object_status == 200:
            self.server.objects[oid] = content
        self.send_response(self.server.object_status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def commit(self, body: bytes, name: str) -> None:
        repository = self.server.repositories[name]
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                repository.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                repository.files[item["value"]["path"]] = self.server.objects[item["value"]["oid"]]
        repository.commits += 1
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        self.reply({"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def tree(self, _: bytes, name: str, folder: str | None) -> None:
        entries = []
        for path, content in self.server.repositories[name].files.items():
            if path.startswith(f"{folder or ''}/".lstrip("/")):
                oid = hashlib.sha256(content).hexdigest()
                lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if len(content) >= 1000 else {}
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid[:40], **lfs})
        self.reply(entries)

    def resolve(self, _: bytes, name: str, path: str) -> None:
        repository = self.server.repositories[name]
        if path not in repository.files:
            return self.reply({"error": "Entry not found"}, status=404, code="EntryNotFound")
        if path == self.server.withheld and self.command == "GET":
            return self.reply({"error": "withheld"}, status=403)
        content = repository.files[path]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.sha)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.server.served.append((path, start))
        most, part = self.server.most_bytes, content[start:]
        if most is not None and len(part) > most:
            self.server.most_bytes = None
            self.wfile.write(part[:most])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(part)
        return None
