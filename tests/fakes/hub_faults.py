"""What a fake hub is ordered to do wrong, and what it saw."""

from __future__ import annotations

import dataclasses

OF_QUESTIONS = ("api_status", "api_redirect", "next_page")


@dataclasses.dataclass
class Fault:
    """One misbehaviour, applied to file transfers whose path matches, `times` times (then all is well again).

    kinds: `cut` (close after `after` bytes of the body), `stall` (wait `seconds` after `after` bytes, then close),
    `ignore_range` (answer 200 with the whole file), `corrupt` (same size, one byte flipped), `change` (the file is another one
    from now on, with another ETag), `other_etag` (so for this one answer), `status` (answer `code`, with `retry_after`),
    `loop` (redirect to itself), `portal` (answer 200 with a log-in page, as networks of hotels do), `api_status` (as `status`,
    for questions: the path is the address's, such as `/api/models*`), `api_redirect` (to `url`), `next_page` (the list's next page lies at `url`).
    """

    kind: str
    path: str = "*"
    times: int = 1
    after: int = 0
    seconds: float = 30.0
    code: int = 503
    retry_after: str = ""
    url: str = ""
    skip: int = 0  # let this many matching requests pass first


@dataclasses.dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    host: str
    headers: dict[str, str]
    query: dict[str, list[str]]
    status: int = 0
    sent: int = 0  # body bytes written
