"""A server to which huggingface_hub uploads: one that makes repositories and takes commits, in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from http_servers import Answering, serving
from huggingface_hub import constants


@dataclass
class Commit:
    """What a request changed at once."""

    branch: str
    parent: str | None
    added: list[str]
    deleted: list[str]


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    branches: set[str] = field(default_factory=lambda: {"main"})

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


@dataclass
class Hub:
    """The server: its address, repositories by name, and the requests (method, path, token)."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    token: str = "secret"
    broken: str = ""  # requests whose path contains this end in an error


@contextlib.contextmanager
def hub_for_uploads() -> Iterator[Hub]:
    """Runs the server, and has huggingface_hub use it with the token that it takes."""
    hub = Hub()

    class Handler(Answering):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, token))
            if path.startswith("/blob/"):
                hub.blobs[path.removeprefix("/blob/")] = content
                self.answer_json(200, {})
            elif token != hub.token or (hub.broken and hub.broken in path):
                self.answer_json(403, {"error": "You don't have the rights"})
            elif path == "/api/validate-yaml":
                self.answer_json(200, {"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                self.create(json.loads(content))
            else:
                self.of_a_repository(path, content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, Repo(bool(asked.get("private")) or asked.get("visibility") == "private"))
            self.answer_json(409 if known else 200, {"url": f"{hub.url}/{name}"})

        def of_a_repository(self, path: str, content: bytes) -> None:
            name = next((name for name in hub.repos if f"/{name}/" in f"{path}/" or f"/{name}.git" in path), None)
            if name is None:
                self.answer_json(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
                return
            repo, rest = hub.repos[name], path.partition(name)[2]
            if rest == "" or rest.startswith("/revision/"):
                siblings = [{"rfilename": file} for file in repo.files]
                self.answer_json(200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})
            elif rest.startswith("/branch/"):
                repo.branches.add(rest.removeprefix("/branch/"))
                self.answer_json(200, {})
            elif rest.startswith("/preupload/"):
                files = [one["path"] for one in json.loads(content)["files"]]
                modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
                answers = [{"path": f, "uploadMode": mode, "shouldIgnore": False} for f, mode in modes.items()]
                self.answer_json(200, {"files": answers})
            elif rest == ".git/info/lfs/objects/batch":
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                    for one in json.loads(content)["objects"]
                ]
                self.answer_json(200, {"transfer": "basic", "objects": objects})
            elif rest.startswith("/commit/"):
                self.commit(name, rest.removeprefix("/commit/"), content)
            elif rest.startswith("/resolve/"):
                file = repo.files.get(rest.removeprefix("/resolve/").partition("/")[2])
                etag = {"ETag": f'"{hashlib.sha1(file or b"").hexdigest()}"', "X-Repo-Commit": repo.sha}
                self.answer(404 if file is None else 200, file or b"", etag)
            else:
                self.answer_json(404, {"error": path})

        def commit(self, name: str, branch: str, content: bytes) -> None:
            repo = hub.repos[name]
            operations = [json.loads(line) for line in content.splitlines()]
            done = Commit(branch, None, [], [])
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "header":
                    done.parent = value.get("parentCommit")
                elif key == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                    done.added.append(value["path"])
                elif key == "lfsFile":
                    repo.files[value["path"]] = hub.blobs[value["oid"]]
                    done.added.append(value["path"])
                elif key == "deletedFile":
                    del repo.files[value["path"]]
                    done.deleted.append(value["path"])
            repo.commits.append(done)
            url = f"{hub.url}/{name}/commit/{repo.sha}"
            self.answer_json(200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

        def answer_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            self.answer(status, json.dumps(content).encode(), headers)

    with serving(Handler) as hub.url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", hub.token)
        yield hub
