"""A server that answers as the Hugging Face hub does, for one repository."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from http_servers import Answering, serving

COMMIT = "2" * 40


class Request(NamedTuple):
    method: str
    path: str
    token: str | None


class Hub(NamedTuple):
    """A running server: its address, and what was asked of it."""

    url: str
    requests: list[Request]


@contextlib.contextmanager
def hub_server(name: str, folder: Path, revision: str = "main", token: str | None = None) -> Iterator[Hub]:
    """Serves the files of `folder` as the repository ``owner/name``.

    Args:
        name: Of the repository.
        folder: Its files.
        revision: Its only branch.
        token: If given, every request needs it.
    """
    requests: list[Request] = []
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Handler(Answering):
        def do_GET(self) -> None:
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            requests.append(Request(self.command, self.path, given))
            path = self.path.partition("?")[0]
            if token is not None and given != token:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif path in {f"/api/models/{name}/revision/{ref}" for ref in (revision, COMMIT)}:
                siblings = [{"rfilename": file} for file in files]
                content = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
                self.answer(200, json.dumps(content).encode())
            elif path == f"/api/models/{name}/tree/{COMMIT}":
                tree = [{"type": "file", "path": file, "size": len(held), "oid": "0"} for file, held in files.items()]
                self.answer(200, json.dumps(tree).encode())
            elif path.startswith(f"/{name}/resolve/") and path.partition("/resolve/")[2].partition("/")[2] in files:
                content = files[path.partition("/resolve/")[2].partition("/")[2]]
                self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
            elif path.startswith(f"/api/models/{name}/"):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

    with serving(Handler) as url:
        yield Hub(url, requests)
