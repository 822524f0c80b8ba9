"""Compare two models over the same tokens: the certificate of a merge, an export, a quantization.

Both are held in memory where they fit; else A's logits of the text go to a temporary file first. Nothing is computed on a
graphics card, so that a certificate does not depend on one.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from app.adapters.merge_staging import require_space, write_atomically, write_error
from app.core.certify_plan import LARGEST_TEXT, Certificate, CertifyPlan, CertifySide, section
from app.core.errors import ErrorKind, WeftError
from app.engine.pausing import Pausing
from app.engine.reporting import Report
from app.generation.compare_logits import Comparison
from app.generation.score_windows import ScoreWindow, score_windows
from app.generation.sides import Side

Parameters = CertifyPlan
_SPARE = 0.8  # of free memory may be taken
_LARGEST_FILE = 4 * 10**9  # bytes of logits that are put aside
_MARGIN = 64 * 1024 * 1024


def run(parameters: CertifyPlan, report: Report) -> Certificate:
    """Compare.

    Raises:
        WeftError: BAD_INPUT, NOT_FOUND, UNSUPPORTED, CORRUPT; OUT_OF_MEMORY, DISK_FULL, CANCELLED.
    """
    return _Certify(parameters, report).run()


class _Certify:
    def __init__(self, plan: CertifyPlan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.data = _text_of(plan)
        self.tokens: list[int] = []
        self.found = Comparison()
        self.window = plan.window
        self._check = Pausing(report).check  # asked as it goes

    def run(self) -> Certificate:
        plan = self.plan
        free = free_memory()
        a_bytes, b_bytes = (_bytes_of(Path(side.model)) for side in (plan.a, plan.b))
        together = plan.together
        if together is None:
            together = not free or a_bytes + b_bytes < _SPARE * free
        if together:
            share = _SPARE * free * a_bytes / max(1, a_bytes + b_bytes)
            with self._opened(plan.a, int(share)) as a, self._opened(plan.b, int(_SPARE * free - share)) as b:
                self._prepare(a)
                if b.context:
                    self.window = min(self.window, max(2, b.context))
                text = self._start()
                self._check_same(a.vocabulary, b.vocabulary, a.tokenize(text), b.tokenize(text))
                self._compare(a, b, min(a.rows, b.rows))
        else:
            self._in_turn(int(_SPARE * free))
        return self._store(self._certificate())

    # Both at once ----------------------------------------------------------------------------------

    def _compare(self, a: Side, b: Side, rows: int) -> None:
        for part, fed in self._windows():
            at = part.start + 1
            for x, y in zip(a.read(fed, rows), b.read(fed, rows), strict=True):
                self._check()
                self.found.add(x, y, self.tokens[at : at + len(x)])
                at += len(x)
            self.report.progress("Comparing", part.end, len(self.tokens), "tokens")

    def _windows(self) -> Iterator[tuple[ScoreWindow, list[int]]]:
        for part in score_windows(len(self.tokens), self.window):
            # Windows overlap by the one token that nothing was predicted of.
            part = ScoreWindow(part.first - 1, part.first, part.end)
            yield part, self.tokens[part.start : part.end - 1]

    # One after the other ---------------------------------------------------------------------------

    def _in_turn(self, free: int) -> None:
        import numpy

        cache = os.environ.get("WEFT_CACHE") or None  # the system's temporary folder may lie in memory
        if cache:
            Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="weft-certify-", dir=cache) as folder:
            file = Path(folder) / "logits"
            with self._opened(self.plan.a, free) as a:
                self._prepare(a)
                most = max(2, _LARGEST_FILE // (4 * a.vocabulary))
                if len(self.tokens) > most:
                    self.tokens = self.tokens[:most]
                    self.notes.append(f"The models do not fit into memory together: {most:,} tokens were compared.")
                rows, vocabulary, alone = a.rows, a.vocabulary, a.tokenize(self._start())
                require_space(Path(folder), 4 * vocabulary * len(self.tokens) + _MARGIN, "What A predicts")
                try:
                    with file.open("wb") as out:
                        for part, fed in self._windows():
                            for x in a.read(fed, rows):
                                self._check()
                                out.write(numpy.ascontiguousarray(x, "<f4").data)
                            self.report.progress("Reading the text with A", part.end, len(self.tokens), "tokens")
                except OSError as error:
                    raise write_error(file, error) from error
            with self._opened(self.plan.b, free) as b, file.open("rb") as stored:
                self._check_same(vocabulary, b.vocabulary, alone, b.tokenize(self._start()))
                for part, fed in self._windows():
                    at = part.start + 1
                    for y in b.read(fed, min(rows, b.rows)):
                        self._check()
                        data = stored.read(4 * vocabulary * len(y))
                        x = numpy.frombuffer(data, "<f4").reshape(len(y), vocabulary)
                        self.found.add(x, y, self.tokens[at : at + len(y)])
                        at += len(y)
                    self.report.progress("Reading the text with B", part.end, len(self.tokens), "tokens")

    # Text and tokens -------------------------------------------------------------------------------

    def _start(self) -> str:
        """As much of the text as its tokens are compared of."""
        return self.data.decode("utf-8", "replace")[: 8 * self.plan.tokens]

    def _prepare(self, a: Side) -> None:
        """Settle the tokens and the windows."""
        if a.context:
            self.window = min(self.window, max(2, a.context))
        self.tokens = a.tokenize(self._start())[: self.plan.tokens]
        if len(self.tokens) < 2:
            raise WeftError(ErrorKind.BAD_INPUT, "The text has less than two tokens.", "Give a longer text.")

    def _check_same(self, a_size: int, b_size: int, a: list[int], b: list[int]) -> None:
        if a_size != b_size:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The vocabularies differ: A has {a_size:,} tokens, B {b_size:,}. Predictions cannot be compared.",
                "Compare models of the same vocabulary, such as a model and what was made of it.",
            )
        if a != b and (a == b[1:] or a[1:] == b):
            which = "B" if a == b[1:] else "A"
            self.notes.append(
                f"Of the two, only {which}'s tokenizer puts a token for the beginning before texts: both were given A's tokens."
            )
        elif a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            self.notes.append(
                f"The two tokenizers split this text differently (first at token {place}): both models were given A's tokens."
            )

    # Models ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, side: CertifySide, free: int) -> Iterator[Side]:
        made = self._gguf(side) if side.is_gguf else self._folder(side, free)
        try:
            self.notes += made.notes
            yield made
        finally:
            made.close()

    def _folder(self, side: CertifySide, free: int) -> Side:
        from app.generation.sides import TransformersSide

        made = TransformersSide(
            Path(side.model), free, self.report.progress, lambda: self.report.cancelled, _packing(Path(side.model))
        )
        if side.stack.adapters:
            from app.adapters.hf_stack import ModelStack

            try:
                made.stack = ModelStack(made.model)
                _, notes = made.stack.set(side.stack, self.report.progress)
            except BaseException:
                made.close()
                raise
            made.notes += notes
        return made

    def _gguf(self, side: CertifySide) -> Side:
        from app.adapters.llama_stack import LlamaStack
        from app.adapters.merged_copies import MergedCopies
        from app.generation.sides import LlamaSide

        path = Path(side.model)
        live, notes = side.stack, list[str]()
        if live.adapters:
            path, live, notes = MergedCopies(path).serve(
                side.stack,
                0,
                lambda done, total: self.report.progress("Merging a copy of the model", done, total, "bytes"),
                lambda: self.report.cancelled,
            )
        made = LlamaSide(path, self.plan.window, self.report.progress, lambda: self.report.cancelled)
        made.notes += notes
        if live.adapters:
            try:
                pointers = made.model.pointer, made.context_pointer
                made.stack = LlamaStack(made.library, *pointers, path, made.log.reason)
                made.notes += made.stack.set(live, self.report.progress)[1]
            except BaseException:
                made.close()
                raise
        return made

    # The result ------------------------------------------------------------------------------------

    def _certificate(self) -> Certificate:
        found, plan = self.found, self.plan
        a, b = found.perplexities()
        return Certificate(
            a=_title(plan.a),
            b=_title(plan.b),
            text=Path(plan.text).name,
            text_sha256=hashlib.sha256(self.data).hexdigest(),
            predictions=found.count,
            largest_logit_difference=found.largest,
            mean_kl=found.kl / max(1, found.count),
            largest_kl=found.largest_kl,
            top1_agreement=found.agreed / max(1, found.count),
            perplexity_a=a,
            perplexity_b=b,
            window=self.window,
            notes=list(dict.fromkeys(self.notes)),
            made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - self.started,
        )

    def _store(self, found: Certificate) -> Certificate:
        if not self.plan.store:
            return found
        target = Path(self.plan.store)
        file = target / "certificate.json" if target.is_dir() else target.with_name(f"{target.stem}.certificate.json")
        files = [file]
        try:
            if target.is_dir():
                files.append(_into_card(target / "README.md", section(found)))
            found = msgspec.structs.replace(found, files=[str(path) for path in files])
            write_atomically(file, msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        except OSError as error:
            raise write_error(file, error) from error
        return found


def _packing(folder: Path) -> Callable[[list[Path], dict[str, Any]], Any] | None:
    """What reads a folder that GPTQ, AWQ or HQQ has packed: by what the codes stand for, in no kernel's own rounding."""
    from app.core.quantization import PACKED
    from app.tasks.merge import packing_of

    if packing_of(folder) not in PACKED:
        return None
    from app.adapters.packed_load import PackedConfig, Stored, table_of

    return lambda weights, config: PackedConfig(Stored(weights, table_of(config, folder)), kernel="exact")


def _into_card(card: Path, text: str) -> Path:
    """Put a section at a card's end; an earlier one goes, what stands behind that stays."""
    before = card.read_text("utf-8") if card.is_file() else ""
    rest = re.sub(r"\n## Certificate\n.*?(?=\n## |\Z)", "", before, flags=re.DOTALL)
    write_atomically(card, (rest.rstrip("\n") + "\n" + text).encode())
    return card


def _title(side: CertifySide) -> str:
    name = side.name or Path(side.model).name
    return f"{name} with {side.stack.title}" if any(a.weight for a in side.stack.adapters) else name


def _text_of(plan: CertifyPlan) -> bytes:
    if plan.tokens < 2 or plan.window < 2:
        raise WeftError(ErrorKind.BAD_INPUT, "Two tokens at least are needed.", "Correct --tokens and --window.")
    for side in (plan.a, plan.b):
        if not Path(side.model).exists():
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no model {side.model}.", "Check the path.")
    try:
        with Path(plan.text).open("rb") as file:
            data = file.read(LARGEST_TEXT)
    except OSError as error:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"The text {plan.text} cannot be read: {error.strerror}.", "Name a text file."
        ) from error
    if not data.strip():
        raise WeftError(ErrorKind.BAD_INPUT, f"The text {plan.text} is empty.", "Give a longer text.")
    return data


def _bytes_of(path: Path) -> int:
    """About how much memory a model takes: float32 for folders."""
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix in (".safetensors", ".bin") and not p.name.startswith("adapter")]
        return 2 * sum(p.stat().st_size for p in files)
    from app.core.recognise_gguf import parts_of

    return sum(p.stat().st_size for p in parts_of(path)[0])


def free_memory() -> int:
    """Bytes of main memory that may be taken; 0 when that cannot be told."""
    try:
        from app.generation.llama_machine import free_memory
    except ImportError:
        return 0
    return free_memory()
