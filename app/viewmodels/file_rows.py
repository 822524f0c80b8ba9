"""The lines of a repository's file list: which files are one choice, in what order, and which of them people mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.core.library import ModelEntry, ModelFormat
from app.hub.files import Listing, RemoteFile
from app.hub.pieces import PIECE, Pieces, ordered
from app.hub.selection import Choice, choices_in_pieces, lost_parts, repository_files_in_pieces
from app.viewmodels.fitting import Fitting

_JUDGED = 50  # choices in a piece: each is held against the machine


class FileRow(msgspec.Struct, kw_only=True, gc=False):
    """One line of a file list: a file, or files that are of use only together.

    Attributes:
        bytes: of all its files.
        model: a GGUF model. usual: part of what "the repository" means. problem: why it is of no use as it is.
        here: bytes of it that lie on this machine already, and of these `in_place` where they would go.
        sees: it comes with a projector, so that the model can see images.
    """

    title: str
    files: tuple[RemoteFile, ...]
    bytes: int
    quantization: str = ""
    fitting: Fitting | None = None
    model: bool = False
    usual: bool = False
    checked: bool = False
    here: int = 0
    in_place: int = 0
    sees: bool = False
    problem: str = ""


class FileRows:
    """A repository's lines, made in pieces: its GGUF models as whole choices first, then the rest by size.

    Args:
        folder: where its files would go; None when nobody knows. judge: where a model of this size fits.

    Attributes:
        rows: complete when `work` has ended. whole: where the repository's usual weights fit together.
        holds_weights: whether there is anything in it to run. projector: what goes with every GGUF model of it.
    """

    def __init__(self, listing: Listing, folder: Path | None, judge: Callable[[ModelEntry], Fitting]) -> None:
        self._listing = listing
        self._folder = f"{folder}{os.sep}" if folder is not None else ""
        self._judge = judge
        self.rows: list[FileRow] = []
        self.whole: Fitting | None = None
        self.holds_weights = False
        self.projector: RemoteFile | None = None

    def work(self) -> Pieces[None]:
        listing = self._listing
        choices = yield from choices_in_pieces(listing.files)
        self.projector = choices[0].projector if choices else None
        usual_files = yield from repository_files_in_pieces(listing.files)
        usual: set[str] = set()
        for number, file in enumerate(usual_files, 1):
            usual.add(file.path)
            if not number % PIECE:
                yield
        covered: set[str] = set()
        for number, choice in enumerate(choices, 1):
            self.rows.append(self._of_choice(choice))
            covered.update(file.path for file in choice.all_files)
            if not number % _JUDGED:
                yield

        def place(file: RemoteFile) -> tuple[object, ...]:
            # The parts of a model in their own order, then what else is usual, the largest first.
            return (file.path not in usual, *((0, 0) if is_weight(file.path) else (1, -file.size)), file.path)

        weights = 0
        for number, file in enumerate((yield from ordered(listing.files, place)), 1):
            if file.path not in covered:
                self.rows.append(FileRow(title=file.path, files=(file,), bytes=file.size, usual=file.path in usual))
            if file.path in usual and is_weight(file.path):
                weights += file.size
            if not number % PIECE:
                yield
        if listing.kind == "model" and weights:
            self.whole = self._judge(entry_of(listing.repo, weights, ModelFormat.SAFETENSORS))
        yield from self._finish()

    def _of_choice(self, choice: Choice) -> FileRow:
        lost, size = lost_parts(choice), choice.bytes
        return FileRow(
            title=choice.title,
            files=choice.all_files,
            bytes=size,
            quantization=choice.quantization,
            fitting=self._judge(entry_of(choice.title, size, ModelFormat.GGUF)),
            model=True,
            sees=choice.projector is not None,
            problem=f"{lost} of its parts are missing on the hub" if lost else "",
        )

    def _finish(self) -> Pieces[None]:
        """What is here already, and what the files of one model share: they fit together or not at all."""
        for number, row in enumerate(self.rows, 1):
            weights = is_weight(row.title)
            if self._listing.here:
                row.here = sum(map(self.bytes_here, row.files))
                row.in_place = sum(map(self.bytes_in_place, row.files))
            if row.usual and weights:
                row.fitting = self.whole
            self.holds_weights = self.holds_weights or row.model or weights
            if not number % PIECE:
                yield

    def bytes_here(self, file: RemoteFile | None) -> int:
        """The file's, where it lies on this machine already; else 0."""
        return file.size if file is not None and file.path in self._listing.here else 0

    def bytes_in_place(self, file: RemoteFile | None) -> int:
        """The file's, where it lies in the folder that it would go to; else 0."""
        place = self._listing.here.get(file.path, "") if file is not None else ""
        return file.size if file is not None and place and self._folder and place.startswith(self._folder) else 0

    def proposed(self) -> list[FileRow]:
        """The repository's usual files; of several GGUF models the one that most people want and that fits."""
        models = [row for row in self.rows if row.model]
        if not models:
            return [row for row in self.rows if row.usual]
        fitting = [
            row for row in models if row.fitting is not None and row.fitting.tone == "positive" and not row.problem
        ]
        for wanted in ("Q4_K_M", "Q5_K_M", "Q4_K_S"):
            if found := [row for row in fitting if row.quantization == wanted]:
                return found[:1]
        return fitting[-1:] if len(models) > 1 else models

    def named(self, which: str) -> list[FileRow]:
        """The rows that `usual`, `all` or `none` means."""
        if which == "usual":
            usual = [row for row in self.rows if row.usual]
            return usual if any(is_weight(row.title) for row in usual) else self.proposed()
        return self.rows if which == "all" else []


def notes_of(row: FileRow) -> list[str]:
    """What is worth knowing of a line, the most important first: the rest may not find room."""
    notes: list[str] = []
    if row.in_place >= row.bytes * 0.99 and row.in_place:
        notes.append("downloaded")
    elif row.here:
        notes.append("on this machine" if row.here >= row.bytes * 0.99 else "partly on this machine")
    if row.sees:
        notes.append("sees images")
    if len(row.files) > 1:
        notes.append(f"{len(row.files)} files")
    return notes


def is_weight(path: str) -> bool:
    return path.lower().endswith((".safetensors", ".bin", ".pt", ".pth"))


def entry_of(name: str, size: int, kind: ModelFormat) -> ModelEntry:
    """A model of which only the size is known."""
    return ModelEntry(id=name, name=name, path=name, root="", format=kind, bytes=size, weight_bytes=size)
