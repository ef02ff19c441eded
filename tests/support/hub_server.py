"""A Hub on the loop-back interface: enough of the Hugging Face Hub's HTTP interface to push and pull by repo id.

Repositories live in memory as git has them: a commit is a whole tree of files, branches and tags are names of
commits. Large files take the LFS path (batch, PUT, verify, then a commit that only names them) and are served behind
a redirect, as on the real Hub, so that a client's own code for both is what the tests run.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.support.hub_cards import card_errors

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx")
LFS_SIZE = 10_000_000
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>models|spaces)"
MODEL = f"/api/{KIND}/{REPO}"


class RefusedError(Exception):
    """An answer other than success: its status, the Hub's error code for clients and a message."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | headers


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it went to the large file storage."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The name git gives it: that of the content, or of the pointer which stands for a large file."""
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        """Describe the file as listings do."""
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass
class Repository:
    """Commits, each a whole tree of files, and the branches and tags that name them."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        """Make `files` the tree of a new commit, the branch's newest; returns its id."""
        tree = [[path, blob.oid] for path, blob in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(self.commits), branch, tree]).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's id names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def files(self, revision: str = "main") -> dict[str, Blob]:
        """The tree of a revision, by path."""
        return self.commits[self.resolve(revision)]


class LoopbackHub(ThreadingHTTPServer):
    """The server with what it holds; use it as a context manager.

    Args:
        tokens: user names by access token. A user writes below the own name only.

    Attributes:
        repositories: by id, `"user/name"`, or `"spaces/user/name"` of a Space.
        requests: one `"METHOD path"` for each request that came in.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.errors: list[BaseException | None] = []
        self.lock = threading.Lock()
        self._drops: list[str] = []
        self._failures: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def storage_url(self, oid: str) -> str:
        """Return the address of a large file: another host, so that clients treat it as a separate service."""
        return f"http://localhost:{self.server_port}/storage/{oid}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        assert not self.errors, self.errors

    def handle_error(self, request, client_address):
        """Keep what a request broke on, for the end to fail on; a client that hangs up breaks nothing."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.errors.append(error)

    def drop(self, pattern: str, times: int = 1) -> None:
        """Break the connection half-way through the next `times` requests whose `"METHOD path"` the pattern fits."""
        self._drops += [pattern] * times

    def undrop(self) -> int:
        """Serve every request again; returns how many drops were left."""
        left = len(self._drops)
        self._drops.clear()
        return left

    def takes_drop(self, request: str) -> bool:
        """Return True if this request is to be broken; each drop counts once."""
        for pattern in self._drops:
            if re.match(pattern, request):
                self._drops.remove(pattern)
                return True
        return False

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose `"METHOD path"` the pattern fits by this status and nothing else."""
        self._failures += [(pattern, status)] * times

    def serve_all(self) -> int:
        """Fail no request any more; returns how many failures were left."""
        left = len(self._failures)
        self._failures.clear()
        return left

    def takes_failure(self, request: str) -> int | None:
        """The status by which this request is to fail; each failure counts once."""
        for pattern, status in self._failures:
            if re.match(pattern, request):
                self._failures.remove((pattern, status))
                return status
        return None

    def copy(self, source: str, target: str) -> None:
        """Make a repository `target` whose main branch holds what that of `source` holds."""
        self.repositories[target] = Repository(target)
        self.repositories[target].commit("main", self.repositories[source].files())


_ROUTES: list[tuple[str, re.Pattern, str]] = []


def _route(method: str, pattern: str):
    """Mark a handler's method as the answer to a request; in the pattern's groups are its arguments."""

    def mark(function):
        _ROUTES.append((method, re.compile(pattern + r"/?"), function.__name__))
        return function

    return mark


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def _serve(self):
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.takes_drop(request):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(length)
        try:
            with self.server.lock:
                status = self.server.takes_failure(request)
                if status is not None:
                    raise RefusedError(status, "", f"made to answer {status}")
                self._dispatch(path)
        except RefusedError as refused:
            self._answer({"error": str(refused)}, refused.status, **refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (the names http.server looks for)

    def _dispatch(self, path: str):
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in _ROUTES:
            match = pattern.fullmatch(path)
            if match and wanted == method:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                kind = arguments.pop("kind", "models").strip("/")
                if "repo" in arguments:
                    arguments["repo"] = arguments["repo"] if kind == "models" else f"{kind}/{arguments['repo']}"
                    arguments["repo"] = self._repository(arguments["repo"], writes=method != "GET")
                return getattr(self, name)(**arguments)
        raise RefusedError(404, "NotFound", f"no route for {self.command} {path}")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def _repository(self, repo_id: str, writes: bool) -> Repository:
        user, owner = self._user(), repo_id.split("/")[-2]
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and user != owner):
            # The real Hub tells nobody that a private repository exists.
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if writes and user != owner:
            raise RefusedError(403 if user else 401, "", f"You may not write to {repo_id}")
        return repository

    def _answer(self, content, status: int = 200, **headers: str):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format, *args):
        """Say nothing: `LoopbackHub.requests` is the log."""

    @_route("POST", "/api/repos/create")
    def _create(self):
        wish = json.loads(self.body)
        user = self._user()
        repo_id = f"{wish.get('organization') or user}/{wish['name']}"
        if user != repo_id.split("/")[0]:
            raise RefusedError(403 if user else 401, "", f"You may not create {repo_id}")
        if wish.get("type") == "space":
            if "sdk" not in wish:
                raise RefusedError(400, "", "a Space needs an sdk")
            repo_id = f"spaces/{repo_id}"
        known = repo_id in self.server.repositories
        if not known:
            self.server.repositories[repo_id] = Repository(repo_id, wish.get("visibility") == "private")
        self._answer({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, 409 if known else 200)

    @_route("DELETE", "/api/repos/delete")
    def _delete(self):
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or self._user()}/{wish['name']}"
        repo_id = f"spaces/{repo_id}" if wish.get("type") == "space" else repo_id
        del self.server.repositories[self._repository(repo_id, writes=True).name]
        self._answer({})

    @_route("POST", "/api/validate-yaml")
    def _validate_card(self):
        errors = card_errors(json.loads(self.body)["content"])
        if errors:
            raise RefusedError(400, "", "Invalid metadata: " + "; ".join(errors))
        self._answer({"errors": [], "warnings": []})

    @_route("GET", f"{MODEL}(/revision/(?P<revision>[^/]+))?")
    def _info(self, repo: Repository, revision: str = "main"):
        oid = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in repo.files(oid)]
        about = {"private": repo.private, "gated": "manual" if repo.gated else False}
        self._answer({"id": repo.name, "sha": oid, **about, "siblings": siblings, "tags": []})

    @_route("GET", f"{MODEL}/tree/(?P<revision>[^/]+)")
    def _tree(self, repo: Repository, revision: str):
        self._answer([blob.entry(path) for path, blob in repo.files(revision).items()])

    @_route("GET", f"{MODEL}/refs")
    def _refs(self, repo: Repository):
        def listed(kind: str, refs: dict[str, str]):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        self._answer({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    @_route("POST", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, repo: Repository, branch: str):
        if branch in repo.branches:
            raise RefusedError(409, "", f"Reference refs/heads/{branch} already exists")
        repo.branches[branch] = repo.resolve(json.loads(self.body).get("startingPoint", "main"))
        self._answer({})

    @_route("DELETE", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def _delete_branch(self, repo: Repository, branch: str):
        del repo.branches[branch]
        self._answer({})

    @_route("POST", f"{MODEL}/tag/(?P<revision>[^/]+)")
    def _create_tag(self, repo: Repository, revision: str):
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise RefusedError(409, "", f"Reference refs/tags/{tag} already exists")
        repo.tags[tag] = repo.resolve(revision)
        self._answer({})

    @_route("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, repo: Repository, revision: str):
        known = repo.files(revision)
        answers = []
        for wish in json.loads(self.body)["files"]:
            path = wish["path"]
            large = path.endswith(LFS_SUFFIXES) or wish["size"] > LFS_SIZE
            oid = {"oid": known[path].oid} if path in known else {}
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid})
        self._answer({"files": answers})

    @_route("POST", f"/(?P<kind>spaces/)?{REPO}.git/info/lfs/objects/batch")
    def _lfs_batch(self, repo: Repository):
        objects = []
        for wish in json.loads(self.body)["objects"]:
            oid = wish["oid"]
            actions = {name: {"href": self.server.storage_url(oid)} for name in ("upload", "verify")}
            objects.append(wish if oid in self.server.storage else wish | {"actions": actions})
        self._answer({"transfer": "basic", "objects": objects})

    @_route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
    def _store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "", f"the content is not that of {oid}")
        self.server.storage[oid] = self.body
        self._answer({})

    @_route("POST", "/storage/(?P<oid>[0-9a-f]{64})")
    def _verify(self, oid: str):
        if oid not in self.server.storage:
            raise RefusedError(404, "", f"{oid} was not uploaded")
        self._answer({})

    @_route("GET", "/storage/(?P<oid>[0-9a-f]{64})")
    def _fetch(self, oid: str):
        self._answer(self.server.storage[oid], ETag=f'"{oid}"')

    @_route("POST", f"{MODEL}/commit/(?P<revision>[^/]+)")
    def _commit(self, repo: Repository, revision: str):
        if revision not in repo.branches:
            raise RefusedError(404, "RevisionNotFound", f"{revision} is not a branch")
        files = dict(repo.files(revision))
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", repo.resolve(revision)) != repo.resolve(revision):
            raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        oid = repo.commit(revision, files)
        url = f"{self.server.url}/{repo.name}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})

    def _apply(self, files: dict[str, Blob], operation: str, value: dict):
        path = value["path"]
        if operation == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif operation == "lfsFile" and value["oid"] in self.server.storage:
            files[path] = Blob(self.server.storage[value["oid"]], is_lfs=True)
        elif operation == "deletedFile" and path in files:
            del files[path]
        else:
            raise RefusedError(400, "", f"{operation} cannot be done: {path}")

    @_route("GET", f"/(?P<kind>spaces/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, repo: Repository, revision: str, path: str):
        commit = {"X-Repo-Commit": repo.resolve(revision)}
        blob = repo.files(revision).get(path)
        if blob is None:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist", **commit)
        if not blob.is_lfs:
            return self._answer(blob.content, ETag=f'"{blob.oid}"', **commit)
        size = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
        return self._answer(b"", 302, Location=self.server.storage_url(blob.sha256), **commit, **size)
