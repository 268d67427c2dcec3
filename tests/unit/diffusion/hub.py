"""A model hub on loopback: enough of its REST interface that huggingface_hub's own client downloads from it.

Run as a program with a folder `owner/name/files…`; prints its port. Every file that is asked for is written to `asked.txt`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "refs-pr-1", COMMIT)


class Handler(BaseHTTPRequestHandler):
    root: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = self.root / owner / name
        if not repository.is_dir():
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif is_api and rest[:1] == ["auth-check"] and "gated" in name:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif is_api and rest[:1] in (["revision"], ["tree"]) and rest[1] not in REVISIONS:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif is_api and rest[:1] == ["tree"]:
            files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
            entries = [{"type": "file", "path": str(p.relative_to(repository)), "size": p.stat().st_size, "oid": etag(p)} for p in files]
            self.answer(200, json.dumps(entries).encode())
        elif is_api:
            self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())
        elif "gated" in name:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        else:
            file = repository / "/".join(rest[2:])
            if self.command == "GET":
                with (self.root / "asked.txt").open("a") as asked:
                    asked.write("/".join(rest[2:]) + "\n")
            self.answer(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
