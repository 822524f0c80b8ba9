"""The part of the fake hub that sends files: the hub's own addresses, its store's, ranges, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tests.fakes.hub_content import HubFile, make_file
from tests.fakes.hub_faults import Fault

_OTHER = bytes(byte ^ 1 for byte in range(256))


class TransferHandler:
    """Mixed into the hub's request handler."""

    hub: Any
    headers: Any
    record: Any
    command: str
    path: str
    connection: socket.socket
    wfile: Any
    close_connection: bool
    _repo: Any
    _error: Any
    _start: Any
    _head: Any
    _redirect: Any

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._repo(name, files=True)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in files:
            return self._error(404, "EntryNotFound", f"Entry not found: {path}")
        file, commit = files[path], repo.commit(revision) or ""
        headers = {"X-Repo-Commit": commit}
        fault = self.hub.take_fault(path, *(("loop",) if self.command == "HEAD" else ()))
        if fault and fault.kind == "status":
            return self._error(
                fault.code, "", "as ordered", {"Retry-After": fault.retry_after} if fault.retry_after else {}
            )
        if fault and fault.kind == "loop":
            return self._redirect(self.path, headers)
        if fault:
            self.hub.misbehave(dataclasses.replace(fault, times=1, skip=0))  # for the transfer itself
        store = f"/blob-store/{quote(name, safe='')}/{commit}/{quote(path)}"
        if not file.lfs:
            return self._transfer(file, path, headers, files) if self.command == "GET" else self._head(file, headers)
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.etag}"'}
        if self.hub.xet:
            token = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": file.sha256[::-1], "Link": f'<{token}>; rel="xet-auth"'}
        return self._redirect(f"{self.hub.store_scheme}://{self.hub.store_host}{store}", headers)

    def _store(self, path: str) -> None:
        _, _, name, commit, file_path = path.split("/", 4)
        repo = self.hub.repos.get(unquote(name))
        files = repo.files(commit) if repo else None
        if files is None and repo:
            files = next(iter(repo.revisions.values()))  # the file changed behind a signed URL
        file = files.get(unquote(file_path)) if files else None
        if file is None:
            return self._error(404, "", "No such blob")
        if self.hub.xet and file.size > self.hub.whole and "Range" not in self.headers and self.command == "GET":
            return self._error(403, "", "Too large for one answer")
        return self._transfer(file, unquote(file_path), {}, files) if self.command == "GET" else self._head(file, {})

    def _transfer(
        self, file: HubFile, path: str, headers: dict[str, str], files: dict[str, HubFile] | None = None
    ) -> None:
        fault = self.hub.take_fault(path)
        if fault and fault.kind == "status":
            return self._error(
                fault.code, "", "as ordered", {"Retry-After": fault.retry_after} if fault.retry_after else {}
            )
        if fault and fault.kind in ("change", "other_etag"):
            file = make_file(path, _read(file).translate(_OTHER), file.lfs)
            if fault.kind == "change" and files is not None:
                files[path] = file
        if fault and fault.kind == "portal":
            page = b"<html>Please log in</html>"
            self._start(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
            self.wfile.write(page)
            return None
        start, stop, status = 0, file.size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", f'"{file.etag}"') == f'"{file.etag}"'
        if wanted and unchanged and self.hub.ranges and not (fault and fault.kind == "ignore_range"):
            start = int(wanted[1])
            stop = min(file.size, int(wanted[2]) + 1) if wanted[2] else file.size
            if start >= file.size:
                return self._error(416, "", "Range Not Satisfiable", {"Content-Range": f"bytes */{file.size}"})
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
        self._start(
            status,
            headers
            | {
                "ETag": f'"{file.etag}"',
                "Content-Length": str(stop - start),
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            },
        )
        self._send(file, start, stop, fault)
        return None

    def _send(self, file: HubFile, start: int, stop: int, fault: Fault | None) -> None:
        began, position = time.monotonic(), start
        limit = start + fault.after if fault and fault.kind in ("cut", "stall") else None
        chunk_size = 1 << 20 if not (self.hub.rate or self.hub.total_rate) else 1 << 16
        stream = file.source.open("rb") if isinstance(file.source, Path) else None
        try:
            while position < stop:
                end = min(stop, position + chunk_size)
                if limit is not None and end > limit:
                    end = max(position, limit)
                if end > position:
                    self._send_piece(
                        file, stream, position, end, bool(fault and fault.kind == "corrupt" and position == start)
                    )
                    self.record.sent += end - position
                    position = end
                    self.hub.pace(min(chunk_size, end - start), began, position - start)
                if limit is not None and position >= limit:
                    if fault and fault.kind == "stall":
                        self.hub.ended.wait(fault.seconds)
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
        except OSError:
            self.close_connection = True
        finally:
            if stream:
                stream.close()

    def _send_piece(self, file: HubFile, stream: Any, start: int, end: int, corrupt: bool) -> None:
        if stream is not None and not corrupt:
            offset = start
            while offset < end:
                offset += os.sendfile(self.connection.fileno(), stream.fileno(), offset, end - offset)
            return
        piece = _read(file, start, end)
        if corrupt:
            piece = bytes([piece[0] ^ 0xFF]) + piece[1:]
        self.wfile.write(piece)


def _read(file: HubFile, start: int = 0, end: int | None = None) -> bytes:
    if isinstance(file.source, bytes):
        return file.source[start:end]
    with file.source.open("rb") as stream:
        stream.seek(start)
        return stream.read(-1 if end is None else end - start)
