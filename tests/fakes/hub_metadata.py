"""The part of the fake hub that answers questions: who asks, what there is, which files a repository has."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, quote

from tests.fakes.hub_content import HubRepo


class MetadataHandler:
    """Mixed into the hub's request handler."""

    hub: Any
    headers: Any
    rfile: Any
    record: Any
    _error: Any
    _json: Any

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _repo(self, name: str, files: bool = False) -> HubRepo | None:
        repo, token = self.hub.repos.get(name), self._token()
        if token and token not in self.hub.tokens:
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and token not in repo.accepted_tokens):
            # As the real hub does: without a token one cannot tell missing from private.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if files and repo.denied:
            self._error(403, "GatedRepo", "Your request to access this model has been rejected by the repo's authors.")
            return None
        if files and repo.gated and token not in repo.accepted_tokens:
            words = (
                "Access is restricted and you are not in the authorized list."
                if token
                else "You must be authenticated to access it."
            )
            self._error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted. {words}")
            return None
        return repo

    def _whoami(self) -> None:
        user = self.hub.tokens.get(self._token())
        if user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        return self._json(
            {
                "type": "user",
                "id": "1",
                "name": user,
                "fullname": user,
                "orgs": [],
                "auth": {"accessToken": {"role": self.hub.roles.get(self._token(), "read")}},
            }
        )

    def _search(self) -> None:
        query = self.record.query
        words = query.get("search", [""])[0].lower()
        found = [r for r in self.hub.repos.values() if words in r.id.lower() and not r.private]
        if author := query.get("author", [""])[0]:
            found = [r for r in found if r.id.startswith(f"{author}/")]
        for wanted in query.get("filter", []):
            found = [r for r in found if wanted in r.tags]
        key = query.get("sort", ["downloads"])[0]
        found.sort(key=lambda r: r.modified if key == "lastModified" else getattr(r, key, 0), reverse=True)
        size = min(int(query.get("limit", ["1000"])[0]), self.hub.page_size)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(found):
            rest = "&".join(f"{k}={quote(v)}" for k, vs in query.items() if k != "cursor" for v in vs)
            headers["Link"] = f'<{self.hub.endpoint}/api/models?{rest}&cursor={start + size}>; rel="next"'
        if fault := self.hub.take_fault("/api/models", "next_page"):
            headers["Link"] = f'<{fault.url}>; rel="next"'
        return self._json([r.info(next(iter(r.revisions), "main")) for r in found[start : start + size]], headers)

    def _info(self, name: str, revision: str | None) -> None:
        if repo := self._repo(name):
            revision = revision or "main"
            if repo.files(revision) is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return self._json(repo.info(revision))
        return None

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        if not (repo := self._repo(name)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        recursive = self.record.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries: list[dict[str, object]] = []
        folders: set[str] = set()
        for path in sorted(p for p in files if p.startswith(prefix)):
            head, slash, _ = path[len(prefix) :].partition("/")
            if slash and prefix + head not in folders:
                folders.add(prefix + head)
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + head})
            if not slash or recursive:
                entries.append(files[path].tree_entry())
        return self._json(entries)

    def _refs(self, name: str) -> None:
        if repo := self._repo(name):
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": repo.commit(b)} for b in repo.revisions]
            self._json({"branches": branches, "converts": [], "tags": []})

    def _auth_check(self, name: str) -> None:
        if self._repo(name, files=True):
            self._json({})

    def _paths_info(self, name: str, revision: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not (repo := self._repo(name)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        try:
            paths = json.loads(body)["paths"]
        except (ValueError, KeyError):
            paths = parse_qs(body.decode()).get("paths", [])
        return self._json([files[p].tree_entry() for p in paths if p in files])
