"""A Hugging Face Hub on the loopback interface, in memory, for the real clients: nothing of them is replaced.

It knows repositories of models and datasets with their commits, branches and tags, LFS uploads, private and gated
repositories, and three tokens. Spaces, discussions and Xet storage are missing. To look at it by hand:

    python tests/hub_server.py --port 8080
"""

from __future__ import annotations

import argparse
import base64
import codecs
import hashlib
import json
import re
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_WriteTokenOfTheTests"
READ_TOKEN = "hf_ReadTokenOfTheTests"
OTHER_TOKEN = "hf_OtherTokenOfTheTests"
_USERS = {WRITE_TOKEN: ("someone", "write"), READ_TOKEN: ("someone", "read"), OTHER_TOKEN: ("other", "write")}

_SLOW_SECONDS = 0.5
_LFS_SIZE = 10_000_000
_LFS_SUFFIXES = "arrow|bin|ckpt|gz|h5|joblib|msgpack|npy|npz|onnx|parquet|pickle|pkl|pt|pth|safetensors|skops|tar|zip"
_GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES.split("|"))

# A repository's id is "name" or "user/name"; the pattern backs off to "name" where an action follows.
_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_ACTIONS = "auth-check|branch|commit|commits|paths-info|preupload|refs|revision|settings|tag|tree"
_API = re.compile(rf"/api/(?P<type>model|dataset)s/{_ID}(?:/(?P<action>{_ACTIONS})(?:/(?P<rest>.+))?)?")
_LFS_BATCH = re.compile(rf"/(?:(?P<type>dataset)s/)?{_ID}\.git/info/lfs/objects/batch")
_LFS_OBJECT = re.compile(rf"/lfs/(?P<type>model|dataset)s/{_ID}/(?P<oid>[0-9a-f]{{64}})")
_RESOLVE = re.compile(rf"/(?:(?P<type>dataset)s/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Request:
    """One request as it was answered; `status` is 0 where the connection was closed without an answer."""

    method: str
    path: str  # without quoting and query
    body_bytes: int
    token: str | None
    status: int


@dataclass(frozen=True)
class Commit:
    """One commit: what it changed, and in `snapshot` all files after it."""

    oid: str
    title: str
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    parent: str | None = field(repr=False)
    date: str = field(repr=False)
    snapshot: Mapping[str, _Blob] = field(repr=False)


@dataclass(frozen=True)
class _Blob:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Hash of what git stores: the file, or a pointer to the large file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        stored = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid, "blobId": self.git_oid}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry | ({"lfs": lfs} if self.lfs else {})


@dataclass
class _Repo:
    id: str
    type: str
    private: bool = False
    gated: str | bool = False
    history: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by SHA-256

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        return f"datasets/{self.id}" if self.type == "dataset" else self.id

    def resolve(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.history:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def commit(self, branch: str, title: str, changes: Mapping[str, _Blob | None]) -> Commit:
        """Put a commit on a branch; `None` deletes a file."""
        parent = self.branches.get(branch)
        before = self.history[parent].snapshot if parent else {}
        after = {path: blob for path, blob in {**before, **changes}.items() if blob is not None}
        content = [parent, title, sorted((path, blob.git_oid) for path, blob in after.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        added = tuple(sorted(path for path in after if after[path] != before.get(path)))
        deleted = tuple(sorted(before.keys() - after.keys()))
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.history[oid] = Commit(oid, title, added, deleted, parent, date, after)
        self.branches[branch] = oid
        self.objects.update({blob.sha256: blob.data for blob in after.values() if blob.lfs})
        return self.history[oid]

    def log(self, revision: str) -> list[Commit]:
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.history[commits[-1].parent])
        return commits


@dataclass
class _Fault:
    pattern: re.Pattern[str]
    action: int | str
    times: float
    method: str | None
    after: int

    def strikes(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or not self.pattern.search(f"{method} {path}"):
            return False
        self.after -= 1
        if self.after >= 0 or self.times <= 0:
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class _Call:
    method: str
    raw_path: str
    raw_query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def user(self) -> tuple[str | None, str]:
        """Name and role of who asks; without a token, nobody, who may read."""
        if self.token is not None and self.token not in _USERS:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return _USERS[self.token] if self.token else (None, "read")

    def option(self, name: str) -> str:
        return parse_qs(self.raw_query).get(name, [""])[0]

    def flag(self, name: str) -> bool:
        return self.option(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class _Answer:
    status: int = 200  # 0 closes the connection
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = _json({"error": message}, status, {"X-Error-Message": message, **named})


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubServer:
    """A Hub that listens on 127.0.0.1 from `start` to `stop`.

    Args:
        port (`int`, *optional*, defaults to 0):
            Where to listen; 0 takes a free port, which stays the same from then on.
    """

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._lock = threading.RLock()
        self._listener: _Listener | None = None
        self.reset()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> HubServer:
        self._listener = _Listener(self._port, self._answer)
        self._port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and close the open connections; the repositories stay."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse every connection meanwhile, as a Hub that cannot be reached."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def reset(self) -> None:
        """Forget repositories, faults and the log of requests."""
        with self._lock:
            self._repos: dict[tuple[str, str], _Repo] = {}
            self._moved: dict[tuple[str, str], str] = {}
            self._faults: list[_Fault] = []
            self.requests: list[Request] = []

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that lead every client here. They are read when `huggingface_hub` is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # a client with Xet uploads large files in no other way
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a Space for it
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: str | bool = False,
        branch: str = "main",
    ) -> str:
        """Make a repository, or take the one that is there, commit `files` to a branch and return the commit."""
        with self._lock:
            repo = self._repos.get((repo_type, repo_id)) or self._new_repo(repo_type, repo_id)
            repo.private, repo.gated = private or repo.private, ("auto" if gated is True else gated) or repo.gated
            repo.branches.setdefault(branch, repo.branches["main"])
            blobs = {path: _Blob(data, _is_lfs(path, len(data), data[:512])) for path, data in (files or {}).items()}
            return repo.commit(branch, "Add files", blobs).oid if blobs else repo.branches[branch]

    def rename(self, old: str, new: str, repo_type: str = "model") -> None:
        """Give a repository another id; requests for the old one are redirected."""
        with self._lock:
            repo = self._repos[repo_type, new] = self._repos.pop((repo_type, old))
            repo.id = self._moved[repo_type, old] = new
            self._moved.pop((repo_type, new), None)

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first; the last one is the Hub's own."""
        with self._lock:
            return self._repos[repo_type, repo_id].log(revision)

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Return what a revision holds."""
        return {path: blob.data for path, blob in self.commits(repo_id, repo_type, revision)[0].snapshot.items()}

    def fault(
        self, pattern: str, action: int | str, *, times: float = 1, method: str | None = None, after: int = 0
    ) -> None:
        """Make matching requests fail.

        Args:
            pattern (`str`):
                Regular expression, searched in "METHOD /path" (without quoting and query).
            action (`int` or `str`):
                A status to answer; "drop" closes the connection without an answer; "cut" carries the request out and
                closes after half of the answer; "slow" answers after half a second. A status and "drop" come before
                anything is carried out.
            times (`float`, *optional*, defaults to 1):
                How many requests; `math.inf` for all.
            method (`str`, *optional*):
                Only requests of this method.
            after (`int`, *optional*, defaults to 0):
                How many matching requests come first.
        """
        if action not in ("drop", "cut", "slow") and not isinstance(action, int):
            raise ValueError(f"`action` must be a status, 'drop', 'cut' or 'slow', got {action!r}.")
        with self._lock:
            self._faults.append(_Fault(re.compile(pattern), action, times, method, after))

    def clear_faults(self) -> None:
        """Answer as it should be again."""
        with self._lock:
            self._faults.clear()

    def _answer(self, call: _Call) -> _Answer:
        path = unquote(call.raw_path)
        with self._lock:
            struck = [fault.action for fault in self._faults if fault.strikes(call.method, path)]
        if "slow" in struck:
            time.sleep(_SLOW_SECONDS)
        with self._lock:
            try:
                for status in struck:
                    if isinstance(status, int):
                        raise _Refusal(status, "A fault of the tests")
                answer = _Answer(0) if "drop" in struck else replace(self._route(call), cut="cut" in struck)
            except _Refusal as refusal:
                answer = refusal.answer
            except (KeyError, TypeError, ValueError) as error:
                answer = _Refusal(400, f"Malformed request: {error!r}").answer
            self.requests.append(Request(call.method, path, len(call.body), call.token, answer.status))
        return answer

    def _route(self, call: _Call) -> _Answer:
        path = call.raw_path
        if found := _LFS_OBJECT.fullmatch(path):  # such addresses are their own permission
            return self._receive_object(found, call)
        name, role = call.user
        if path == "/api/whoami-v2":
            if name is None:
                raise _Refusal(401, "Invalid username or password.")
            token = {"displayName": role, "role": role}
            return _json({"type": "user", "id": name, "name": name, "orgs": [], "auth": {"accessToken": token}})
        if path == "/api/validate-yaml":
            return _validate_card(call.json()["content"])
        if path in ("/api/repos/create", "/api/repos/delete", "/api/repos/move"):
            return self._manage_repos(path.rsplit("/", 1)[1], call)
        if path in ("/api/models", "/api/datasets"):
            author, search = call.option("author"), call.option("search")
            repos = [repo for (kind, _), repo in self._repos.items() if path == f"/api/{kind}s"]
            seen = [repo for repo in repos if not repo.private or repo.owner == name]
            return _json([_info(one, "main") for one in seen if author in ("", one.owner) and search in one.id])
        if found := _API.fullmatch(path):
            return self._repo_api(found, call)
        if found := _LFS_BATCH.fullmatch(path):
            return self._lfs_batch(found, call)
        if found := _RESOLVE.fullmatch(path):
            return self._download(found, call)
        raise _Refusal(404, f"No such address here: {call.method} {path}")

    def _manage_repos(self, action: str, call: _Call) -> _Answer:
        asked = call.json()
        repo_type = asked.get("type") or "model"
        if repo_type not in ("model", "dataset"):
            raise _Refusal(400, f"No repositories of type {repo_type} here")
        if action == "move":
            self._find(repo_type, asked["fromRepo"], call, write=True)
            _check_writer(asked["toRepo"], call)
            self.rename(asked["fromRepo"], asked["toRepo"], repo_type)
            return _json({})
        repo_id = f"{asked.get('organization') or call.user[0]}/{asked['name']}"
        if action == "delete":
            self._find(repo_type, repo_id, call, write=True)
            del self._repos[repo_type, repo_id]
            return _json({})
        _check_writer(repo_id, call)
        known = (repo_type, repo_id) in self._repos
        repo = self._repos[repo_type, repo_id] if known else self._new_repo(repo_type, repo_id)
        if known:
            message = f"You already created this {repo_type} repo"
            return _json({"error": message, "url": f"{self.url}/{repo.path}"}, 409, {"X-Error-Message": message})
        repo.private = asked.get("visibility") == "private"
        return _json({"url": f"{self.url}/{repo.path}", "name": repo_id})

    def _new_repo(self, repo_type: str, repo_id: str) -> _Repo:
        repo = self._repos[repo_type, repo_id] = _Repo(repo_id, repo_type)
        self._moved.pop((repo_type, repo_id), None)
        repo.commit("main", "initial commit", {".gitattributes": _Blob(_GITATTRIBUTES.encode(), False)})
        return repo

    def _find(self, repo_type: str | None, repo_id: str, call: _Call, write: bool = False) -> _Repo:
        """Return a repository that the caller may see, and change where `write` says so."""
        kind, new_id = repo_type or "model", repo_id
        while (kind, new_id) in self._moved:
            new_id = self._moved[kind, new_id]
        repo = self._repos.get((kind, new_id))
        name, _ = call.user
        if repo is None or (repo.private and name != repo.owner):
            # The Hub tells nobody whether a repository is private or missing.
            if name is None:
                raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if new_id != repo_id:
            location = call.raw_path.replace(repo_id, new_id, 1) + (f"?{call.raw_query}" if call.raw_query else "")
            raise _Refusal(307, f"Moved to {new_id}", Location=location)
        if write:
            _check_writer(repo_id, call)
        return repo

    def _repo_api(self, found: re.Match[str], call: _Call) -> _Answer:
        """Answer what belongs to one repository: /api/models/ID[/action[/rest]]."""
        action = found["action"]
        write = call.method not in ("GET", "HEAD") and action != "paths-info"
        repo = self._find(found["type"], unquote(found["id"]), call, write=write)
        name, _, folder = (found["rest"] or "main").partition("/")
        name, folder = unquote(name), unquote(folder)
        if action in ("branch", "tag"):
            return _change_ref(repo, action, name, call)
        if action == "settings":
            asked = call.json()
            visibility = asked.get("visibility", "private" if repo.private else "public")
            repo.private = asked.get("private", visibility == "private")
            repo.gated = asked.get("gated", repo.gated)
            return _json({"private": repo.private, "gated": repo.gated})
        if action == "auth-check":
            _check_gate(repo, call)
            return _json({})
        if action == "refs":
            heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
            return _json({"branches": heads, "tags": tags, "converts": []})
        if action == "commits":
            authors = [{"user": repo.owner}]
            log = [{"id": one.oid, "title": one.title, "message": "", "date": one.date} for one in repo.log(name)]
            return _json([one | {"authors": authors} for one in log])
        commit = repo.resolve(name)
        if action == "tree":
            return _json(_tree(commit, folder, recursive=call.flag("recursive")))
        if action == "paths-info":
            everything = {entry["path"]: entry for entry in _tree(commit, "", recursive=True)}
            form = "json" not in call.headers.get("Content-Type", "")
            paths = parse_qs(call.body.decode())["paths"] if form else call.json()["paths"]
            return _json([everything[path] for path in paths if path in everything])
        if action == "preupload":
            return _json({"files": [_upload_mode(commit, file) for file in call.json()["files"]]})
        if action == "commit":
            return self._commit(repo, name, call)
        return _json(_info(repo, name, blobs=call.flag("blobs")))

    def _commit(self, repo: _Repo, branch: str, call: _Call) -> _Answer:
        if branch not in repo.branches or call.flag("create_pr"):
            raise _Refusal(400, f"Commits go to a branch, {branch} is none, and there are no pull requests here")
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        present = repo.resolve(branch).snapshot
        changes: dict[str, _Blob | None] = {}
        for kind, value in [(line["key"], line["value"]) for line in lines if line["key"] != "header"]:
            path = value["path"]
            if kind == "file":
                changes[path] = _Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                changes[path] = _Blob(repo.objects[value["oid"]], True)
            elif kind in ("deletedFile", "deletedFolder"):
                whole = path.rstrip("/") + "/" if kind == "deletedFolder" else path
                gone = [one for one in present if one == path or (whole[-1] == "/" and one.startswith(whole))]
                if not gone:
                    raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                changes.update(dict.fromkeys(gone))
        oid = repo.commit(branch, header["summary"], changes).oid
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.path}/commit/{oid}"})

    def _lfs_batch(self, found: re.Match[str], call: _Call) -> _Answer:
        repo = self._find(found["type"], unquote(found["id"]), call, write=True)
        objects = call.json()["objects"]
        for asked in objects:
            if asked["oid"] not in repo.objects:
                href = f"{self.url}/lfs/{repo.type}s/{repo.id}/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href, "header": {}}}
        return _json({"transfer": "basic", "objects": objects})

    def _receive_object(self, found: re.Match[str], call: _Call) -> _Answer:
        if hashlib.sha256(call.body).hexdigest() != found["oid"]:
            raise _Refusal(400, "The content does not have this SHA-256")
        self._repos[found["type"], unquote(found["id"])].objects[found["oid"]] = call.body
        return _Answer()

    def _download(self, found: re.Match[str], call: _Call) -> _Answer:
        repo = self._find(found["type"], unquote(found["id"]), call)
        _check_gate(repo, call)
        commit = repo.resolve(unquote(found["revision"]))
        blob = commit.snapshot.get(unquote(found["path"]))
        if blob is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        size = len(blob.data)
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if wanted is None:
            return _Answer(200, blob.data, headers)
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        stop = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if start >= stop:
            raise _Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return _Answer(206, blob.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, port: int, answer: Callable[[_Call], _Answer]) -> None:
        self.answer = answer
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would also ask the name server for our name

    def server_close(self) -> None:
        # A process forked meanwhile holds these sockets too: closing them here would leave them open there.
        for connection in (self.socket, *self.connections):
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # which is a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def serve(self) -> None:
        address = urlsplit(self.path)
        # The body is read even where it is refused: the connection's next request comes after it.
        answer = self.server.answer(_Call(self.command, address.path, address.query, self.headers, self.body()))
        self.close_connection = self.close_connection or answer.status == 0 or answer.cut
        if answer.status == 0:
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(body[: len(body) // 2] if answer.cut else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _check_writer(repo_id: str, call: _Call) -> None:
    name, role = call.user
    if name is None:
        raise _Refusal(401, "Invalid username or password.")
    if role != "write" or repo_id.split("/")[0] != name:
        raise _Refusal(403, f'You don\'t have the rights to create or change "{repo_id}" with this token')


def _check_gate(repo: _Repo, call: _Call) -> None:
    name, _ = call.user
    if repo.gated and name != repo.owner:
        raise _Refusal(401 if name is None else 403, f"Access to {repo.type} {repo.id} is restricted.", "GatedRepo")


def _change_ref(repo: _Repo, kind: str, name: str, call: _Call) -> _Answer:
    names = repo.branches if kind == "branch" else repo.tags
    asked = call.json()
    # A branch is posted to its own name, a tag to the revision that it shall mark.
    new, target = (name, asked.get("startingPoint", "main")) if kind == "branch" else (asked.get("tag", name), name)
    if call.method == "DELETE":
        if name not in names or (kind == "branch" and name == "main"):
            raise _Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        del names[name]
    elif new in names:
        raise _Refusal(409, f"Reference already exists: {new}")
    else:
        names[new] = repo.resolve(target).oid
    return _json({})


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Tell whether the Hub stores a file outside git: by its name, its size, or because it is not text."""
    if size == 0 or re.search(rf"\.({_LFS_SUFFIXES})$", path) or size > _LFS_SIZE or b"\0" in sample:
        return size > 0
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=size <= len(sample))
    except UnicodeDecodeError:
        return True
    return False


def _upload_mode(commit: Commit, file: Mapping[str, Any]) -> dict[str, Any]:
    lfs = _is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
    present = commit.snapshot.get(file["path"])
    mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    return mode | ({"oid": present.etag} if present else {})


def _tree(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """List files and folders below a folder ("" for all)."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.snapshot.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            inner = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.oid}:{inner}".encode()).hexdigest()
            entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": oid}
        if recursive or len(parts) == 1:
            entries[path] = blob.entry(path)
    if folder and not entries:
        raise _Refusal(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound", X_Repo_Commit=commit.oid)
    return list(entries.values())


def _info(repo: _Repo, revision: str, blobs: bool = False) -> dict[str, Any]:
    commits = repo.log(revision)
    files = sorted(commits[0].snapshot.items())
    siblings = [{"rfilename": path} | (blob.entry(path) if blobs else {}) for path, blob in files]
    fixed = {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "author": repo.owner}
    dates = {"createdAt": commits[-1].date, "lastModified": commits[0].date}
    state = {"id": repo.id, "sha": commits[0].oid, "private": repo.private, "gated": repo.gated}
    return {**fixed, **dates, **state, "siblings": siblings}


def _validate_card(content: str) -> _Answer:
    """Look at the ends of a card's YAML header: the standard library has no parser for what is between."""
    header = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)(^---[ \t]*\r?$)", content + "\n", re.DOTALL | re.MULTILINE)
    if not content.lstrip("\ufeff").startswith("---"):
        warning = "empty or missing yaml metadata in repo card"
        return _json({"errors": [], "warnings": [{"message": warning}]})
    if header is None or not header[1].strip():
        error = "the metadata are empty" if header else "the metadata do not end with a line `---`"
        return _json({"errors": [{"message": error}], "warnings": [], "error": error}, 400)
    return _json({"errors": [], "warnings": []})


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an empty Hugging Face Hub on this machine.")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 takes a free port")
    parser.add_argument(
        "--home", type=Path, default=Path(tempfile.gettempdir(), "hub_home"), help="HF_HOME of the clients"
    )
    arguments = parser.parse_args()
    server = HubServer(arguments.port).start()
    for name, value in {**server.environment(arguments.home.resolve()), "HF_TOKEN": WRITE_TOKEN}.items():
        print(f"export {name}={value}", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
