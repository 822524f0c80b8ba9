"""`weft download`: the download manager's task, headless."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.cli_events import Asked
from app.core.library import ModelEntry, ModelFormat
from app.core.paths import Paths, default_paths
from app.core.roots import RootKind, found_roots
from app.engine import launch, machine, protocol
from app.engine.client import EngineClient
from app.hub.files import DownloadNews, DownloadResult, Listing, RemoteFile
from app.hub.places import folder_for
from app.hub.reference import HubReference, parse_reference
from app.hub.selection import gguf_choices, pick, repository_choice, usual
from app.store.refresh import library_roots
from app.store.secrets import TokenStore
from app.store.settings import Settings, SettingsStore
from app.terminal import ProgressLine, print_json, readable_bytes, table
from app.viewmodels.fitting import judge
from app.viewmodels.transfer_rates import Speed
from app.viewmodels.units import readable_seconds

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


class ListedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `--list`: a file, or files that are of use only together (a split GGUF, its projector).

    Attributes:
        quantization: read from a GGUF's name, or "". bytes: of all files.
        fits: GPU, GPU + RAM, RAM or No, judged by size alone; "" for what is no model.
    """

    title: str
    quantization: str
    bytes: int
    fits: str
    files: tuple[str, ...]


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
    asked = Asked(engine, protocol.RunTask(task=task, parameters=text))
    last, speed = DownloadNews(), Speed()
    try:
        for event in asked:
            if isinstance(event, protocol.News):
                last = msgspec.json.decode(event.json, type=DownloadNews)
                speed.add(last.fetched)
            elif isinstance(event, protocol.ProgressEvent):
                phase = f"{event.phase} {last.file}" if last.file and not last.waiting else event.phase
                shown = msgspec.structs.replace(event.progress, phase=phase)
                line.show(shown, "" if last.waiting else _pace(speed, last.total - last.done))
    finally:
        line.clear()
    return msgspec.json.decode(asked.result(protocol.TaskResult).json, type=result)  # type: ignore[arg-type]


def _pace(speed: Speed, remaining: int) -> str:
    """`2.1 MB/s, 3 min left`; "" while unknown."""
    left = speed.left(remaining)
    words = [f"{readable_bytes(speed.now)}/s"] if speed.now >= 1 else []
    return ", ".join(words + ([f"{readable_seconds(left)} left"] if left is not None else []))


def listed_files(listing: Listing, files: tuple[RemoteFile, ...]) -> list[ListedFile]:
    """Files in the choices that make sense: the GGUF models first, smallest first, then the rest by name."""
    here = machine.probe()

    def fits(name: str, size: int, kind: ModelFormat) -> str:
        return judge(
            ModelEntry(id=name, name=name, path=name, root="", format=kind, bytes=size, weight_bytes=size), here
        ).word

    usual_files = {file.path for file in repository_choice(listing.files).files}
    weights = [f for f in listing.files if f.path in usual_files and f.path.endswith((".safetensors", ".bin"))]
    whole = ""  # the weights of one model fit together or not at all
    if weights and listing.kind == "model":
        whole = fits(listing.repo, sum(file.size for file in weights), ModelFormat.SAFETENSORS)
    lines = [
        ListedFile(
            title=choice.title,
            quantization=choice.quantization,
            bytes=choice.bytes,
            fits=fits(choice.title, choice.bytes, ModelFormat.GGUF),
            files=tuple(file.path for file in choice.all_files),
        )
        for choice in gguf_choices(files)
    ]
    covered = {path for line in lines for path in line.files}
    return lines + [
        ListedFile(
            title=file.path,
            quantization="",
            bytes=file.size,
            fits=whole if file in weights else "",
            files=(file.path,),
        )
        for file in sorted(files, key=lambda file: file.path)
        if file.path not in covered
    ]


def _print_listing(listing: Listing, files: tuple[RemoteFile, ...], as_json: bool) -> int:
    lines = listed_files(listing, files)
    if as_json:
        listing = msgspec.structs.replace(listing, files=tuple(files))
        print_json({**msgspec.to_builtins(listing), "choices": lines})
        return 0
    rows = [
        [
            line.title,
            line.quantization,
            readable_bytes(line.bytes),
            line.fits,
            f"{len(line.files)} files" if len(line.files) > 1 else "",
        ]
        for line in lines
    ]
    print(table(["file", "quantization", "size", "fits", ""], rows))
    gated = ", gated" if listing.gated else ""
    print(
        f"\n{listing.repo} at {listing.revision} ({listing.commit[:12]}), {listing.kind}{gated}, {_count(files)}",
        file=sys.stderr,
    )
    choices = gguf_choices(listing.files)
    if len(choices) > 1:
        print(f"hint: fetch one with --file {choices[0].quantization or choices[0].title}", file=sys.stderr)
    return 0


def _count(files: Sequence[RemoteFile]) -> str:
    return f"{len(files)} file" + ("s" if len(files) != 1 else "")


def _print_result(listing: Listing, files: tuple[RemoteFile, ...], result: DownloadResult, as_json: bool) -> None:
    if as_json:
        entries = [
            {"path": place, "file": file.path, "size": file.size, "sha256": file.sha256}
            for file, place in zip(files, result.paths, strict=True)
        ]
        print_json(
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
                "kept": result.kept,
                "seconds": result.seconds,
            }
        )
        return
    print(result.folder)
    speed = f", {readable_bytes(result.fetched / result.seconds)}/s" if result.fetched and result.seconds else ""
    taken = f", {readable_bytes(result.reused)} of it from copies on this machine" if result.reused else ""
    for place in result.kept:
        print(f"A file of yours had the same name: it is now {place}", file=sys.stderr)
    print(f"{listing.repo}: {_count(files)}, {readable_bytes(result.bytes)}{taken}, verified{speed}", file=sys.stderr)


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
