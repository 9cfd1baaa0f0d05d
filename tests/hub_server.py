"""A Hub on loopback: enough of its HTTP protocol for the real `huggingface_hub` client, in memory.

Importing this module points the Hugging Face libraries, which read the address once, at a server of this process that
runs only while a test asks for it. So no test reaches the real Hub.
"""

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_user": "user", "hf_stranger": "stranger"}  # token: account
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".h5ad")


@dataclass
class Repository:
    """Files of each commit, and the branches and tags that name commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Set a branch to a new commit with these files."""
        content = repr((branch, len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """Commit of a branch, tag or commit."""
        known = self.branches | self.tags | {sha: sha for sha in self.commits}
        return known.get(revision.removeprefix("refs/heads/"))


class HubServer:
    """The server and what it holds; tests change its attributes to make it fail."""

    def __init__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self._http.server_bind()  # not yet listening: connections are refused
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread: threading.Thread | None = None
        self.connections: set[socket.socket] = set()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.parts: dict[str, dict[int, bytes]] = {}  # of multi-part uploads
        self.part_size: int | None = None  # larger files are uploaded in parts of this many bytes
        self.truncated: set[str] = set()  # paths whose downloads break off half-way
        self.full = False  # commits are refused
        self.requests: list[str] = []

    def start(self) -> None:
        """Listen."""
        if self._http.socket.fileno() < 0:
            self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler, bind_and_activate=False)
            self._http.server_bind()
        self._http.hub = self
        self._http.server_activate()
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()
            for connection in list(self.connections):  # the client keeps them open, and they would go on to be served
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._thread = None

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Files of a repository at a revision."""
        repository = self.repositories[repo_type, repo_id]
        return repository.commits[repository.find(revision)]

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", private: bool = False) -> str:
        """Make a repository without a client; returns its commit."""
        self.repositories[repo_type, repo_id] = Repository(private)
        return self.repositories[repo_type, repo_id].commit("main", files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(self, status: int, body=b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("content_type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    # -- requests ------------------------------------------------------------------------------------------------------

    def handle_request(self) -> None:
        self.hub: HubServer = self.server.hub
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        self.body = self.read_body()
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in method and match:
                return self.dispatch(function, **match.groupdict())
        self.refuse(404, f"no such endpoint: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def dispatch(self, function, type=None, id=None, rev=None, **arguments) -> None:
        authorization = self.headers.get("Authorization")
        token = (authorization or "").removeprefix("Bearer ")
        if authorization and token not in TOKENS and function is not get_object:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.account = TOKENS.get(token)
        if id is None:
            return function(self, **arguments)
        self.repo_type = {"datasets": "dataset", "datasets/": "dataset"}.get(type, "model")
        repository = self.hub.repositories.get((self.repo_type, id))
        if repository is None or (repository.private and self.account != id.split("/")[0]):
            return self.refuse(404 if self.account else 401, "Repository not found", "RepoNotFound")
        if self.command not in ("GET", "HEAD") and function is not paths_info and self.account != id.split("/")[0]:
            if self.account is None:
                return self.refuse(401, "Invalid username or password.")
            return self.refuse(403, f"You don't have the rights to write to {id}.")
        self.id, self.repository = id, repository
        self.rev = rev or "main"
        self.sha = repository.find(self.rev)
        if self.sha is None:
            return self.refuse(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        function(self, **arguments)


def whoami(h):
    if h.account is None:
        return h.refuse(401, "Invalid username or password.")
    h.answer(200, {"type": "user", "name": h.account, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(h):
    wanted = json.loads(h.body)
    if h.account is None:
        return h.refuse(401, "Invalid username or password.")
    namespace = wanted.get("organization") or h.account
    if namespace != h.account:
        return h.refuse(403, f"You don't have the rights to create a model under the namespace {namespace!r}.")
    repo_type, repo_id = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
    url = f"{h.hub.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if (repo_type, repo_id) in h.hub.repositories:
        return h.answer(409, {"error": "You already created this repository", "url": url})
    private = wanted.get("private") or wanted.get("visibility") == "private"
    h.hub.add(repo_id, {".gitattributes": b""}, repo_type, private)
    h.answer(200, {"url": url, "name": repo_id, "id": repo_id})


def validate_yaml(h):
    h.answer(200, {"errors": [], "warnings": []})


def info(h):
    siblings = [{"rfilename": path} for path in h.repository.commits[h.sha]]
    about = {"_id": "0", "id": h.id, "sha": h.sha, "siblings": siblings, "private": h.repository.private, "tags": []}
    h.answer(200, about | {"lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0})


def check_write(h):
    if h.account != h.id.split("/")[0]:
        return h.refuse(403, f"You don't have the rights to write to {h.id}.")
    h.answer(200, {})


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(h, path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def entries(h) -> dict[str, dict]:
    found = {}
    for path, content in h.repository.commits[h.sha].items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            found[folder] = {"type": "directory", "path": folder, "oid": blob_id(folder.encode()), "size": 0}
        found[path] = describe(h, path, content)
    return found


def tree(h, path=""):
    under = f"{path}/" if path else ""
    found = {name: entry for name, entry in entries(h).items() if name.startswith(under)}
    if path and not found:
        return h.refuse(404, f"{path} does not exist on {h.rev}", "EntryNotFound")
    if h.query.get("recursive", "false").lower() not in ("true", "1"):
        found = {name: entry for name, entry in found.items() if "/" not in name[len(under) :]}
    h.answer(200, list(found.values()))


def paths_info(h):
    if h.headers.get("Content-Type", "").startswith("application/json"):
        paths = json.loads(h.body)["paths"]
    else:
        paths = parse_qs(h.body.decode()).get("paths", [])
    found = entries(h)
    h.answer(200, [found[path] for path in paths if path in found])


def refs(h):
    kinds = {"branches": ("heads", h.repository.branches), "tags": ("tags", h.repository.tags)}
    listed = {
        kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()]
        for kind, (folder, names) in kinds.items()
    }
    h.answer(200, listed | {"converts": []})


def create_branch(h, branch):
    if branch in h.repository.branches:
        return h.refuse(409, f"Reference already exists: {branch}")
    start = json.loads(h.body or b"{}").get("startingPoint") or "main"
    sha = h.repository.find(start)
    if sha is None:
        return h.refuse(404, f"Invalid rev id: {start}", "RevisionNotFound")
    h.repository.branches[branch] = sha
    h.answer(200, {})


def create_tag(h):
    h.repository.tags[json.loads(h.body)["tag"]] = h.sha
    h.answer(200, {})


def preupload(h):
    files = []
    for file in json.loads(h.body)["files"]:
        mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
    h.answer(200, {"files": files})


def lfs_batch(h):
    objects = []
    for wanted in json.loads(h.body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size}
        if oid not in h.hub.objects:
            upload = {"href": f"{h.hub.url}/lfs/{oid}", "header": {}}
            if h.hub.part_size and size > h.hub.part_size:
                count = -(-size // h.hub.part_size)
                upload["header"] = {str(i + 1): f"{h.hub.url}/lfs/{oid}/{i + 1}" for i in range(count)}
                upload["header"]["chunk_size"] = str(h.hub.part_size)
                upload["href"] += "/complete"
            answer["actions"] = {"upload": upload, "verify": {"href": f"{h.hub.url}/lfs/{oid}/verify"}}
        objects.append(answer)
    h.answer(200, {"transfer": "basic", "objects": objects})


def put_object(h, oid):
    if hashlib.sha256(h.body).hexdigest() != oid:
        return h.refuse(400, "the content has another sha256")
    h.hub.objects[oid] = h.body
    h.answer(200)


def put_part(h, oid, part):
    h.hub.parts.setdefault(oid, {})[int(part)] = h.body
    h.answer(200, ETag=f'"{hashlib.md5(h.body).hexdigest()}"')


def complete(h, oid):
    stored = h.hub.parts.pop(oid)
    for part in json.loads(h.body)["parts"]:
        if part["etag"].strip('"') != hashlib.md5(stored[part["partNumber"]]).hexdigest():
            return h.refuse(400, "a part has another ETag")
    h.body = b"".join(stored[number] for number in sorted(stored))
    put_object(h, oid)


def verify(h, oid):
    known = h.hub.objects.get(oid)
    if known is None or len(known) != json.loads(h.body)["size"]:
        return h.refuse(404, "no such object")
    h.answer(200, {})


def commit(h):
    if h.hub.full:
        return h.refuse(403, "Storage limit exceeded.")
    files = dict(h.repository.commits[h.sha])
    if h.rev not in h.repository.branches:
        return h.refuse(400, "commits go to a branch")
    for line in h.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = h.hub.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "deletedFolder":
            files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
    sha = h.repository.commit(h.rev, files)
    about = {"success": True, "commitOid": sha, "commitUrl": f"{h.hub.url}/{h.id}/commit/{sha}"}
    h.answer(200, about | {"pullRequestUrl": None, "hookOutput": ""})


def resolve(h, path):
    content = h.repository.commits[h.sha].get(path)
    if content is None:
        return h.refuse(404, "Entry not found", "EntryNotFound")
    if not path.endswith(LFS_SUFFIXES):
        return send_file(h, content, path in h.hub.truncated, X_Repo_Commit=h.sha, ETag=f'"{blob_id(content)}"')
    oid = hashlib.sha256(content).hexdigest()
    h.hub.objects[oid] = content
    # Another host name, as on the Hub: on the same one the client would follow at once and lose these headers.
    location = f"http://localhost:{h.hub.port}/lfs/{oid}" + ("?truncated=1" if path in h.hub.truncated else "")
    linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
    h.answer(302, Location=location, X_Repo_Commit=h.sha, **linked)


def get_object(h, oid):
    send_file(h, h.hub.objects[oid], "truncated" in h.query, ETag=f'"{oid}"')


def send_file(h, content: bytes, truncated: bool, **headers: str) -> None:
    status, size, start = 200, len(content), 0
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
    if wanted:
        start, stop = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        status, content = 206, content[start : stop + 1]
        headers["Content_Range"] = f"bytes {start}-{stop}/{size}"
    headers |= {"Accept_Ranges": "bytes", "Last_Modified": formatdate(usegmt=True)}
    if truncated and h.command == "GET":
        h.close_connection = True
        headers["length"] = str(len(content))
        content = content[: len(content) // 2] if start == 0 else b""
    h.answer(status, content, **headers)


_REPOSITORY = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<type>models|datasets)/{_REPOSITORY}"
_REV = r"(?P<rev>refs/heads/[^/]+|[^/]+)"
_OID = r"/lfs/(?P<oid>[0-9a-f]{64})"
READ = ("GET", "HEAD")
ROUTES = [
    (READ, r"/api/whoami-v2", whoami),
    (["POST"], r"/api/repos/create", create),
    (["POST"], r"/api/validate-yaml", validate_yaml),
    (READ, _API, info),
    (READ, rf"{_API}/revision/{_REV}", info),
    (READ, rf"{_API}/auth-check/write", check_write),
    (READ, rf"{_API}/refs", refs),
    (READ, rf"{_API}/tree/{_REV}", tree),
    (READ, rf"{_API}/tree/{_REV}/(?P<path>.+)", tree),
    (["POST"], rf"{_API}/paths-info/{_REV}", paths_info),
    (["POST"], rf"{_API}/preupload/{_REV}", preupload),
    (["POST"], rf"{_API}/commit/{_REV}", commit),
    (["POST"], rf"{_API}/branch/(?P<branch>.+)", create_branch),
    (["POST"], rf"{_API}/tag/{_REV}", create_tag),
    (["POST"], rf"/(?P<type>datasets/)?{_REPOSITORY}\.git/info/lfs/objects/batch", lfs_batch),
    (READ, rf"/(?P<type>datasets/)?{_REPOSITORY}/resolve/{_REV}/(?P<path>.+)", resolve),
    (["PUT"], _OID, put_object),
    (["PUT"], rf"{_OID}/(?P<part>\d+)", put_part),
    (["POST"], rf"{_OID}/complete", complete),
    (["POST"], rf"{_OID}/verify", verify),
    (READ, _OID, get_object),
]

HUB = HubServer()
# Xet, the Hub's newer transfer, needs a server of its own; without it the client speaks LFS.
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": tempfile.mkdtemp(prefix="hub-"), "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ.pop("HF_TOKEN", None)
