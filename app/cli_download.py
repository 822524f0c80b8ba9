"""`weft download`: the download manager's task, headless."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app.core.jobs import Progress
from app.core.paths import Paths, default_paths
from app.core.roots import RootKind, found_roots
from app.engine import launch, protocol
from app.engine.client import EngineClient
from app.hub.files import DownloadNews, DownloadResult, Listing, RemoteFile
from app.hub.places import folder_for
from app.hub.reference import HubReference, parse_reference
from app.hub.selection import gguf_choices, pick, quantization, usual
from app.store.refresh import library_roots
from app.store.secrets import TokenStore
from app.store.settings import Settings, SettingsStore
from app.terminal import ProgressLine, readable_bytes, table

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `download` to the command line's parsers."""
    command: argparse.ArgumentParser = commands.add_parser(
        "download", help="fetch a model or an adapter from the hub, resumed and verified"
    )
    command.set_defaults(run=run)
    command.add_argument(
        "repo", metavar="REPO[:REVISION]", help="user/model, user/model:branch, or the address of a model's page"
    )
    command.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NAME",
        help="a file, a pattern, or a quantization such as q4_k_m (may be repeated); a split GGUF comes whole",
    )
    command.add_argument("--to", type=Path, metavar="DIR", help="put the files into this folder, not the library")
    command.add_argument("--list", action="store_true", help="list the files and fetch nothing")
    command.add_argument("--limit", type=_rate, default=0.0, metavar="RATE", help="bytes a second, such as 500k or 2M")
    command.add_argument("--no-copies", action="store_true", help="fetch also what lies elsewhere on this machine")
    return command


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns the exit status. Raises WeftError."""
    paths = default_paths()
    settings = SettingsStore(paths.settings).settings
    endpoint = settings.hub_endpoint or os.environ.get("HF_ENDPOINT", "")
    reference = parse_reference(parsed.repo, endpoint)
    token, _ = TokenStore().get(endpoint)
    names = [*parsed.file, *([reference.file] if reference.file else [])]
    engine = launch.own_engine(paths, "download-command")
    engine.start()
    try:
        listing = _listing(engine, reference, parsed, settings, paths, endpoint, token)
        if parsed.list:
            return _print_listing(listing, pick(listing.files, names) if names else listing.files, parsed.json)
        files = pick(listing.files, names) if names else usual(listing.files)
        folder = _folder(parsed.to, listing, settings, paths)
        result = _download(engine, listing, files, folder, parsed, settings, token)
    finally:
        engine.shutdown()
    _print_result(listing, files, result, parsed.json)
    return 0


def _listing(
    engine: EngineClient,
    reference: HubReference,
    parsed: argparse.Namespace,
    settings: Settings,
    paths: Paths,
    endpoint: str,
    token: str,
) -> Listing:
    parameters = {
        "reference": reference,
        "roots": [] if parsed.no_copies or parsed.list else copy_roots(settings, paths),
        "except_in": str(parsed.to.absolute()) if parsed.to else "",
        "endpoint": endpoint,
        "proxy": settings.proxy,
        "token": token,
    }
    return _call(engine, "hub_files", parameters, Listing)


def copy_roots(settings: Settings, paths: Paths) -> list[str]:
    """Where copies of a hub's files may lie: the library's folders, and the Hugging Face cache even if it is not indexed."""
    roots = [root.path for root in library_roots(settings, paths)]
    roots += [root.path for root in found_roots() if root.kind is RootKind.HUGGING_FACE]
    return list(dict.fromkeys(roots))


def _folder(to: Path | None, listing: Listing, settings: Settings, paths: Paths) -> Path:
    if to is not None:
        return to.expanduser().absolute()
    models = Path(settings.downloads) if settings.downloads else paths.models
    return folder_for(listing, models, paths.adapters)


def _download(
    engine: EngineClient,
    listing: Listing,
    files: tuple[RemoteFile, ...],
    folder: Path,
    parsed: argparse.Namespace,
    settings: Settings,
    token: str,
) -> DownloadResult:
    own = str(folder) + os.sep
    parameters = {
        "endpoint": listing.endpoint,
        "repo": listing.repo,
        "revision": listing.revision,
        "commit": listing.commit,
        "files": files,
        "folder": str(folder),
        "here": {path: place for path, place in listing.here.items() if not place.startswith(own)},
        "rate": parsed.limit,
        "proxy": settings.proxy,
        "token": token,
    }
    return _call(engine, "download", parameters, DownloadResult)


def _call(engine: EngineClient, task: str, parameters: dict[str, Any], result: Callable[..., Any]) -> Any:
    """Run a task to its end with a progress line; Ctrl+C stops it cleanly."""
    line = ProgressLine()
    text = msgspec.json.encode(parameters).decode()
    command = engine.send(protocol.RunTask(task=task, parameters=text))
    last = DownloadNews()
    try:
        while True:
            try:
                event = engine.next_event(None)
            except KeyboardInterrupt:
                engine.cancel(command)
                continue
            engine.raise_if_ended(command, event)
            if isinstance(event, protocol.News):
                last = msgspec.json.decode(event.json, type=DownloadNews)
            elif isinstance(event, protocol.ProgressEvent):
                phase = f"{event.phase} {last.file}" if last.file and not last.waiting else event.phase
                line.show(Progress(phase=phase, done=event.done, total=event.total, unit=event.unit))
            elif isinstance(event, protocol.Done) and event.id == command:
                assert isinstance(event.result, protocol.TaskResult)
                return msgspec.json.decode(event.result.json, type=result)  # type: ignore[arg-type]
    finally:
        line.clear()


def _print_listing(listing: Listing, files: tuple[RemoteFile, ...], as_json: bool) -> int:
    if as_json:
        _print_json(msgspec.structs.replace(listing, files=tuple(files)))
        return 0
    rows = [
        [file.path, quantization(file.path) if file.path.endswith(".gguf") else "", readable_bytes(file.size)]
        for file in files
    ]
    print(table(["file", "quantization", "size"], rows))
    choices = gguf_choices(listing.files)
    gated = ", gated" if listing.gated else ""
    print(
        f"\n{listing.repo} at {listing.revision} ({listing.commit[:12]}), {listing.kind}{gated}, {len(files)} files",
        file=sys.stderr,
    )
    if len(choices) > 1:
        print(f"hint: fetch one with --file {choices[0].title}", file=sys.stderr)
    return 0


def _print_result(listing: Listing, files: tuple[RemoteFile, ...], result: DownloadResult, as_json: bool) -> None:
    if as_json:
        entries = [
            {"path": place, "file": file.path, "size": file.size, "sha256": file.sha256}
            for file, place in zip(files, result.paths, strict=True)
        ]
        _print_json(
            {
                "repo": listing.repo,
                "revision": listing.revision,
                "commit": listing.commit,
                "kind": listing.kind,
                "folder": result.folder,
                "files": entries,
                "bytes": result.bytes,
                "fetched": result.fetched,
                "reused": result.reused,
                "seconds": result.seconds,
            }
        )
        return
    print(result.folder)
    speed = f", {readable_bytes(result.fetched / result.seconds)}/s" if result.fetched and result.seconds else ""
    taken = f", {readable_bytes(result.reused)} of it from copies on this machine" if result.reused else ""
    count = f"{len(files)} file" + ("s" if len(files) != 1 else "")
    print(f"{listing.repo}: {count}, {readable_bytes(result.bytes)}{taken}, verified{speed}", file=sys.stderr)


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def _rate(text: str) -> float:
    """`500k`, `2M`, `2.5 MB/s`: bytes a second."""
    plain = text.strip().lower().removesuffix("/s").removesuffix("b").strip()
    unit = plain[-1:] if plain[-1:] in ("k", "m", "g") else ""
    try:
        value = float(plain.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write 500k or 2M") from None
    if not 0 <= value < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write 500k or 2M")
    return value
