"""Which files of a repository to fetch: what belongs together, what one quantization is, what a repository has twice."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.hub.files import RemoteFile
from app.hub.pieces import PIECE, Pieces, ordered, whole

_QUANTIZATION = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:IQ[1-4]_(?:XXS|XS|NL|S|M)|Q[2-8]_(?:K(?:_(?:XL|L|M|S))?|[01](?:_[48]_[48])?)|TQ[12]_0|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))(?=[-_./]|$)",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_PROJECTOR = re.compile(r"(?:^|/)[^/]*mmproj[^/]*\.gguf$", re.IGNORECASE)
_PLAIN = (".json", ".txt", ".jinja", ".model", ".md", ".tiktoken", ".spm", ".vocab")
# Copies in other frameworks' formats, a training run's own files, pictures and papers. In lower case.
_LEFT_OUT = re.compile(
    r"(?:^|/)(?:original/|onnx/|openvino/|coreml/|\.git|flax_model|tf_model|rust_model|training_args\.bin|optimizer\.)"
    r"|\.(?:msgpack|h5|ot|onnx|tflite|mlmodel|png|jpg|jpeg|gif|pdf|ipynb)$"
)
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Files that are of use only together: one quantization with all its parts, or the repository's usual files.

    Attributes:
        title: what a list shows: the file's name, without a split's numbering.
        quantization: read from a GGUF's name, upper case, or "".
        files: in order. projector: the mmproj that goes with it, so that the model can see; None when there is none.
    """

    title: str
    quantization: str = ""
    files: tuple[RemoteFile, ...]
    projector: RemoteFile | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.all_files)

    @property
    def all_files(self) -> tuple[RemoteFile, ...]:
        return (*self.files, self.projector) if self.projector else self.files


def quantization(path: str) -> str:
    """The quantization that a GGUF's name tells, such as `Q4_K_M`; "" when it tells none."""
    found = _QUANTIZATION.findall(path)
    return found[-1].upper() if found else ""


def gguf_choices(files: Sequence[RemoteFile]) -> list[Choice]:
    """The GGUF models of a repository, split ones and their projector as one choice each, smallest first."""
    return whole(choices_in_pieces(files))


def choices_in_pieces(files: Sequence[RemoteFile]) -> Pieces[list[Choice]]:
    """As `gguf_choices`."""
    projector: RemoteFile | None = None
    groups: dict[str, list[RemoteFile]] = {}
    for number, file in enumerate(files, 1):
        if file.path.lower().endswith(".gguf"):
            if _PROJECTOR.search(file.path):
                if projector is None or _projector_order(file) < _projector_order(projector):
                    projector = file
            else:
                groups.setdefault(_SPLIT.sub(".gguf", file.path), []).append(file)
        if not number % PIECE:
            yield
    choices: list[Choice] = []
    for number, (title, parts) in enumerate(groups.items(), 1):
        files_of_it = yield from ordered(parts, lambda f: f.path)
        choices.append(
            Choice(title=title, quantization=quantization(title), files=tuple(files_of_it), projector=projector)
        )
        if not number % PIECE:
            yield
    return (yield from ordered(choices, lambda c: (c.bytes, c.title)))


def _projector_order(file: RemoteFile) -> tuple[bool, int]:
    # A 16-bit projector is what programs take when a repository offers several.
    return quantization(file.path) not in ("F16", "FP16"), file.size


def repository_choice(files: Sequence[RemoteFile]) -> Choice:
    """What to fetch when somebody wants the whole model: everything that loading needs, nothing twice.

    `.bin` weights stay away when there are safetensors, and copies in other frameworks' formats always.
    """
    wanted = whole(repository_files_in_pieces(files))
    return Choice(title="", files=tuple(sorted(wanted, key=lambda f: (f.size, f.path))))


def repository_files_in_pieces(files: Sequence[RemoteFile]) -> Pieces[list[RemoteFile]]:
    """The files of `repository_choice`, in no order."""
    usable: list[RemoteFile] = []
    # Folder by folder: a checkpoint's safetensors below do not stand for the .bin weights above.
    twice: set[str] = set()
    for number, file in enumerate(files, 1):
        if not _left_out(file.path):
            usable.append(file)
            if file.path.endswith(".safetensors"):
                twice.add(_folder(file.path))
        if not number % PIECE:
            yield
    kept: list[RemoteFile] = []
    holds_gguf = False
    for number, file in enumerate(usable, 1):
        if not (_is_torch_weight(file.path) and _folder(file.path) in twice):
            kept.append(file)
            holds_gguf = holds_gguf or file.path.endswith(".gguf") or _SPLIT.search(file.path) is not None
        if not number % PIECE:
            yield
    only_gguf = holds_gguf and not twice
    wanted: list[RemoteFile] = []
    for number, file in enumerate(kept, 1):
        if file.path.endswith((*_PLAIN, ".gguf")) if only_gguf else not file.path.endswith(".gguf"):
            wanted.append(file)
        if not number % PIECE:
            yield
    return wanted


def is_adapter(files: Sequence[RemoteFile]) -> bool:
    """Whether a repository holds an adapter rather than a model: what some training programs put beside it does not count
    (the base's config.json), weights of a whole model do. A GGUF may be either."""
    names = {file.path for file in files}
    weights = {name for name in names if name.endswith(".safetensors") or _is_torch_weight(name)} - _NO_WEIGHTS
    whole = any("/" not in name and not name.startswith("adapter_") for name in weights)
    return "adapter_config.json" in names and not whole


def lost_parts(choice: Choice) -> int:
    """How many parts of a split model the repository lacks."""
    # Without writing down the names of all: each of a hundred thousand files may claim to be one of 99,999.
    for file in choice.files:
        if found := _SPLIT.search(file.path):
            base, total = file.path[: found.start()], int(found[2])
            ending = f"-of-{total:05d}.gguf"
            least, length = len(base) + 1, len(base) + 6 + len(ending)
            numbers = {
                int(part.path[least : least + 5])
                for part in choice.files
                if len(part.path) == length and part.path.startswith(base) and part.path.endswith(ending)
            }
            return total - sum(1 <= number <= total for number in numbers)
    return 0


def _left_out(path: str) -> bool:
    return _LEFT_OUT.search(path.lower()) is not None


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _is_weight(path: str) -> bool:
    return path.lower().endswith((".safetensors", ".gguf")) or _is_torch_weight(path.lower())


def _is_torch_weight(path: str) -> bool:
    return path.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"))


def pick(files: Sequence[RemoteFile], names: Sequence[str]) -> tuple[RemoteFile, ...]:
    """The files that somebody named, with what they are useless without: the other parts of a split, the projector.

    Args:
        names: paths, file names, patterns (`*.gguf`) or quantizations (`q4_k_m`).

    Raises:
        WeftError: NOT_FOUND with near names.
    """
    chosen: dict[str, RemoteFile] = {}
    choices = gguf_choices(files)
    for name in names:
        found = [f for f in files if name in (f.path, f.path.rpartition("/")[2])]
        found = found or [f for f in files if fnmatch.fnmatchcase(f.path, name)]
        found = found or [f for c in choices if c.quantization == name.upper() for f in c.files]
        if not found:
            near = difflib.get_close_matches(name, [f.path for f in files], n=3, cutoff=0.4)
            some = near or [f.path for f in files if f.path.endswith((".gguf", ".safetensors"))][:5]
            raise WeftError(
                ErrorKind.NOT_FOUND,
                f"There is no file {name!r} in {files[0].repo if files else 'that repository'}.",
                f"Did you mean {' or '.join(some)}?" if some else "List its files to see what it has.",
            )
        for file in found:
            whole = next((choice for choice in choices if file in choice.files), None)
            for part in whole.all_files if whole is not None else (file,):
                chosen[part.path] = part
    return tuple(chosen.values())


def usual(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """What to fetch when nobody named a file: the repository, or its one GGUF.

    Raises:
        WeftError: BAD_INPUT when it holds several GGUF models, of which people want one; NOT_FOUND when it is empty.
    """
    choices = gguf_choices(files)
    if len(choices) > 1 and not any(file.path.endswith(".safetensors") for file in files):
        titles = ", ".join(choice.quantization or choice.title for choice in choices)
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{files[0].repo} holds {len(choices)} GGUF models: {titles}.",
            f"Name one, such as --file {choices[0].title}, or all with --file '*.gguf'.",
        )
    wanted = repository_choice(files).files
    if not any(_is_weight(file.path) for file in wanted):
        name = files[0].repo if files else "The repository"
        raise WeftError(ErrorKind.NOT_FOUND, f"{name} holds no model or adapter.", "Look at its page on the hub.")
    return wanted
