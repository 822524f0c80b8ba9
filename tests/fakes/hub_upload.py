"""The part of the fake hub that takes files: new repositories, large files in one piece or in parts, commits."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import socket
from typing import Any
from urllib.parse import unquote

from tests.fakes.hub_content import LFS_SUFFIXES, HubRepo, make_file


class Uploads:
    """What a hub has been sent. parts: bytes of a part of a large file; 0 has each come in one piece."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.pieces: dict[tuple[str, int], bytes] = {}
        self.parts = 0
        self.received = 0  # bytes of large files, also of those that were cut off
        self.rate = 0.0


class UploadHandler:
    """Mixed into the hub's request handler."""

    hub: Any
    headers: Any
    rfile: Any

    def upload_route(self, path: str) -> bool:
        """Answer an upload's request. False when it is none."""
        patterns: tuple[tuple[str, str, Any], ...] = (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._yaml),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/blob-store/upload/([0-9a-f]{64})(?:/(\d+))?", self._put),
            ("POST", r"/blob-store/complete/([0-9a-f]{64})", self._complete),
            ("POST", r"/api/verify", self._verify),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
        )
        for method, pattern, handler in patterns:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:  # type: ignore[attr-defined]
                handler(*[unquote(group) if group else group for group in match.groups()])
                return True
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _writer(self, name: str) -> bool:
        """Whether the token may write under this name; else it is answered."""
        token = self._token()  # type: ignore[attr-defined]
        user = self.hub.tokens.get(token)
        if user is None:
            self._error(401, "", "Invalid credentials in Authorization header")  # type: ignore[attr-defined]
        elif self.hub.roles.get(token, "read") != "write" or name.split("/")[0] not in (
            user,
            *self.hub.orgs.get(user, ()),
        ):
            words = (
                f'Forbidden: you don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )
            self._error(403, "", words)  # type: ignore[attr-defined]
        else:
            return True
        return False

    def _create(self) -> None:
        asked = json.loads(self._body())
        user = self.hub.tokens.get(self._token(), "")  # type: ignore[attr-defined]
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not self._writer(name):
            return
        if name in self.hub.repos:
            self._error(409, "", "You already created this model repo")  # type: ignore[attr-defined]
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = HubRepo(name, private=private, accepted_tokens={self._token()})  # type: ignore[attr-defined]
        repo.revisions["main"] = {".gitattributes": make_file(".gitattributes", b"*.gguf filter=lfs\n")}
        self.hub.repos[name] = repo
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})  # type: ignore[attr-defined]

    def _yaml(self) -> None:
        content = json.loads(self._body())["content"]
        if "broken: [" in content:
            self.send_json_error(400, {"errors": [{"message": "bad indentation"}], "warnings": []})
        else:
            self._json({"errors": [], "warnings": []})  # type: ignore[attr-defined]

    def send_json_error(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self._start(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})  # type: ignore[attr-defined]
        self.wfile.write(body)  # type: ignore[attr-defined]

    def _preupload(self, name: str, _revision: str) -> None:
        body = json.loads(self._body())
        if not self._writer(name):
            return
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for f in body["files"]
        ]
        self._json({"files": files, "commitOid": "0" * 40})  # type: ignore[attr-defined]

    def _batch(self, name: str) -> None:
        body = json.loads(self._body())
        if not self._writer(name):
            return
        uploads, objects = self.hub.uploads, list[dict[str, Any]]()
        for each in body["objects"]:
            oid, size = each["oid"], each["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in uploads.blobs:
                store = f"http://{self.hub.store_host}/blob-store"
                upload: dict[str, Any] = {"href": f"{store}/upload/{oid}"}
                if uploads.parts and size > uploads.parts:
                    count = math.ceil(size / uploads.parts)
                    numbered = {f"{n:05d}": f"{store}/upload/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{store}/complete/{oid}",
                        "header": {"chunk_size": str(uploads.parts), **numbered},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/api/verify"}}
            objects.append(entry)
        self._json({"transfer": "multipart" if uploads.parts else "basic", "objects": objects})  # type: ignore[attr-defined]

    def _put(self, oid: str, part: str | None) -> None:
        uploads, wanted = self.hub.uploads, int(self.headers.get("Content-Length", 0))
        fault = self.hub.take_fault(f"upload/{oid}", "status", "cut", "stall")
        data = bytearray()
        while len(data) < wanted:
            if fault and fault.kind in ("cut", "stall") and len(data) >= fault.after:
                if fault.kind == "stall":
                    self.hub.ended.wait(fault.seconds)
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
                return
            piece = self.rfile.read(min(1 << 16, wanted - len(data)))
            if not piece:
                self.close_connection = True
                return
            data += piece
            uploads.received += len(piece)
            if uploads.rate:
                self.hub.ended.wait(len(piece) / uploads.rate)
        if fault and fault.kind == "status":
            self._error(fault.code, "", "as ordered")  # type: ignore[attr-defined]
            return
        if part is None:
            uploads.blobs[hashlib.sha256(data).hexdigest()] = bytes(data)
        else:
            uploads.pieces[oid, int(part)] = bytes(data)
        self._start(200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Length": "0"})  # type: ignore[attr-defined]

    def _complete(self, oid: str) -> None:
        parts = json.loads(self._body())["parts"]
        data = b"".join(self.hub.uploads.pieces[oid, part["partNumber"]] for part in parts)
        self.hub.uploads.blobs[hashlib.sha256(data).hexdigest()] = data
        self._json({})  # type: ignore[attr-defined]

    def _verify(self) -> None:
        asked = json.loads(self._body())
        blob = self.hub.uploads.blobs.get(asked["oid"])
        if blob is None or len(blob) != asked["size"]:
            self._error(404, "", "That file did not arrive whole")  # type: ignore[attr-defined]
        else:
            self._json({})  # type: ignore[attr-defined]

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not self._writer(name):
            return
        repo: HubRepo = self.hub.repos[name]
        files = dict(repo.revisions[revision])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = make_file(value["path"], base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploads.blobs:
                    self._error(400, "", f"{value['path']} was never uploaded")  # type: ignore[attr-defined]
                    return
                files[value["path"]] = make_file(value["path"], self.hub.uploads.blobs[value["oid"]], lfs=True)
        repo.revisions[revision] = files
        oid = repo.commit(revision)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})  # type: ignore[attr-defined]
