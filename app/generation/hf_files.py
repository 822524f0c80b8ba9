"""A model folder as transformers may see it: checked, cleaned of everything that runs code or points elsewhere.

A folder from the internet can ask transformers to import Python files (`auto_map`), to fetch kernels
(`attn_implementation: org/repo`), to load adapters or distributed checkpoints that merely lie there, and to read
weights under other paths. So transformers is shown a staged folder instead: links to the weight and tokenizer files
that were checked, and rewritten JSON files. Imports the standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError

LARGEST_JSON = 64 * 1024 * 1024  # bytes; index files of the largest models have about 10 MB
MOST_LAYERS = 4096
DEEPEST = 32

INDEXES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
SINGLES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}

_TOKENIZER_FILES = frozenset(
    """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt
    merges.txt spiece.model sentencepiece.bpe.model spm.model source.spm target.spm tekken.json chat_template.jinja
    chat_template.json vocab.model tokenizer.model.v1 tokenizer.model.v3 bpe.codes qwen.tiktoken tiktoken.model""".split()
)
_CLEANED = frozenset({"tokenizer_config.json", "special_tokens_map.json", "chat_template.json"})

# Keys that make transformers run or fetch code, or read other files, wherever in a config they stand.
_RUNS_CODE = frozenset(
    """auto_map custom_pipelines custom_generate trust_remote_code _attn_implementation _attn_implementation_internal
    attn_implementation _experts_implementation _experts_implementation_internal experts_implementation
    fusion_config kernel_config use_kernels transformers_weights extra_files distributed_config
    _name_or_path name_or_path _commit_hash gguf_file adapter_kwargs base_model_name_or_path""".split()
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        WeftError: CORRUPT, naming the file, when it is none; NOT_FOUND when it is not there.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise WeftError(ErrorKind.CORRUPT, f"{path} is too large to be what its name says.", _AGAIN)
        value = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise WeftError(ErrorKind.NOT_FOUND, f"{path} is missing.", _AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise WeftError(ErrorKind.CORRUPT, f"{path} is damaged: {error}.", _AGAIN) from error
    except OSError as error:
        raise WeftError(
            ErrorKind.PERMISSION,
            f"{path} cannot be read: {error.strerror}.",
            "Check the disk and the file's permissions.",
        ) from error
    if not isinstance(value, dict):
        raise WeftError(ErrorKind.CORRUPT, f"{path} does not hold a JSON object.", _AGAIN)
    return value


_AGAIN = "Download the model again."


def clean(value: Any, depth: int = 0) -> Any:
    """A copy of a config without the keys that run or fetch code, at every depth.

    Raises:
        WeftError: HOSTILE when it is nested absurdly deep.
    """
    if depth > DEEPEST:
        raise WeftError(ErrorKind.HOSTILE, "The model's config is nested absurdly deep.", "Do not use this model.")
    if isinstance(value, dict):
        return {k: clean(v, depth + 1) for k, v in value.items() if k not in _RUNS_CODE}
    if isinstance(value, list):
        return [clean(v, depth + 1) for v in value]
    return value


def custom_code(config: Any) -> tuple[str, ...]:
    """The Python modules that a config's `auto_map` asks to run, as they stand there (`modeling_x.Model`)."""
    found: list[str] = []
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "auto_map":
                found += _strings(value)
            else:
                found += custom_code(value)
    return tuple(dict.fromkeys(found))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def weight_files(folder: Path, form: str, lone: Path | None = None) -> list[Path]:
    """The weight files of a folder, checked to lie in it.

    Args:
        form: `safetensors` or `bin`. lone: the single file, where it has a name of its own and there is no other.

    Raises:
        WeftError: HOSTILE for an index that names files elsewhere, NOT_FOUND for missing files, CORRUPT for a bad index.
    """
    index = folder / INDEXES[form]
    single = folder / SINGLES[form]
    if single.is_file():  # as transformers does, the single file comes first
        return [single]
    if lone is not None and lone.parent == folder and lone.is_file() and not index.is_file():
        return [lone]
    if not index.is_file():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no {single.name} or {index.name} in {folder}.", _AGAIN)
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise WeftError(ErrorKind.CORRUPT, f"{index} has no weight_map.", _AGAIN)
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        plain = name not in ("", ".", "..") and not set(name) & set('/\\:\0"*?<>|')
        if not plain or not name.endswith((".safetensors",) if form == "safetensors" else (".bin", ".pt", ".pth")):
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{index} names the file {name!r}, which is not a weight file beside it.",
                "Do not use this model.",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeftError(ErrorKind.NOT_FOUND, f"{folder / missing[0]}{more} is missing.", "Download the missing parts.")
    return [folder / name for name in names]


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse numbers that would keep transformers busy building a model that no file can fill.

    Raises:
        WeftError: CORRUPT.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_config(path, value)
        elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts"):
            if isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
                raise WeftError(ErrorKind.CORRUPT, f"{path} says {key} = {value}.", _AGAIN)


def find_template(folder: Path) -> str:
    """The chat template that lies in a folder, as far as a look at its files tells; "" for none."""
    plain = folder / "chat_template.jinja"
    if plain.is_file() and plain.stat().st_size <= LARGEST_JSON:
        return plain.read_text("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, list):  # named templates
                named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
                found = named.get("default") or next(iter(named.values()), "")
            if isinstance(found, str) and found:
                return found
    return ""


class Stage:
    """The staged folder. Lives as long as the model: weights offloaded to disk are read through it.

    Args:
        folder: the model's own.
        form: `safetensors` or `bin`. lone: see `weight_files`.

    Attributes:
        path: the staged folder. config: the cleaned config. weights: the model's own weight files.
    """

    def __init__(self, folder: Path, form: str, lone: Path | None = None) -> None:
        self.original = read_json(folder / "config.json")
        self.config: dict[str, Any] = clean(self.original)
        check_config(folder / "config.json", self.config)
        self.weights = weight_files(folder, form, lone)
        self.custom_code = custom_code(self.original)
        self._temporary = tempfile.TemporaryDirectory(prefix="weft-model-")
        self.path = Path(self._temporary.name)
        try:
            self._fill(folder, form)
        except BaseException:
            self.close()
            raise

    def _fill(self, folder: Path, form: str) -> None:
        _write(self.path / "config.json", self.config)
        indexed = (folder / INDEXES[form]).is_file() and self.weights[0].name != SINGLES[form]
        for file in self.weights:
            _link(file, self.path / (file.name if indexed else SINGLES[form]))
        if indexed:
            _link(folder / INDEXES[form], self.path / INDEXES[form])
        found = stage_tokenizer(folder, self.path)
        self.custom_code += tuple(code for code in found if code not in self.custom_code)

    def close(self) -> None:
        """Remove the links."""
        self._temporary.cleanup()


def stage_tokenizer(folder: Path, target: Path) -> tuple[str, ...]:
    """Put the tokenizer files of a model folder into `target`, cleaned of what runs code or names other files.

    A `config.json`, which transformers asks for the tokenizer's class, is cleaned and put there when `target` has none.

    Returns:
        The Python modules that they ask to run.

    Raises:
        WeftError: CORRUPT, naming the file.
    """
    custom: tuple[str, ...] = ()
    for entry in sorted(folder.iterdir()):
        if entry.name == "config.json" and not (target / entry.name).exists():
            _write(target / entry.name, clean(read_json(entry)))
        if entry.name not in _TOKENIZER_FILES or not entry.is_file():
            continue
        if entry.name in _CLEANED:
            value = read_json(entry)
            custom += custom_code(value)
            _write(target / entry.name, {k: v for k, v in clean(value).items() if not k.endswith("_file")})
        else:
            _link(entry, target / entry.name)
    return custom


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), "utf-8")


def _link(source: Path, target: Path) -> None:
    """Make `target` stand for `source`; where a system allows no links, small files are copied."""
    source = source.resolve()
    for how in (os.symlink, os.link):
        try:
            how(source, target)
            return
        except (OSError, NotImplementedError):
            continue
    if source.stat().st_size > 512 * 1024 * 1024:
        raise WeftError(
            ErrorKind.PERMISSION,
            f"{source} cannot be linked into {target.parent}.",
            "Turn on Windows' developer mode, which allows links, or put the model on the drive of the temporary folder.",
        )
    shutil.copyfile(source, target)
