"""adapter_config.json as PEFT and MLX write it: ranks, scales and what else was trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import cast

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.formats import JsonObject

MAX_PATTERN = 200  # characters of a pattern of module names
_CHANGING = ("pissa", "olora", "corda", "lora_ga")
_LORA_KINDS = ("", "LORA", "ADALORA")
_PLAIN = re.compile(r"[\w.]*")
_LAYERS = 4096
_EXPRESSIONS = 256


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside an adapter's tensors.

    Attributes:
        kind: PEFT's `peft_type` in capitals, `LORA` when none is said.
        rank: `r`; 0 when unknown. The tensors' shapes count, not this.
        alpha: None when unknown: a lone file without a config.
        factor: the whole scale, where it is given as such (MLX); None elsewhere.
        bias: which of the base's own biases were trained: `none`, `all`, `lora_only`.
        rank_pattern, alpha_pattern: regular expressions for the ends of module names, to values of their own.
        modules_to_save, targets: as written.
        tokens: module name to the rows that were trained of it.
        layer_replication: ranges of layers that the adapted model is made of; empty for a plain one.
        tied: tied embeddings stay tied.
        base, revision: the base model as recorded.
        init: how its matrices began, where a word says so (`pissa`, `gaussian`).
    """

    kind: str = "LORA"
    rank: int = 0
    alpha: float | None = None
    factor: float | None = None
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    tokens: dict[str, tuple[int, ...]] = {}
    layer_replication: tuple[tuple[int, int], ...] = ()
    tied: bool = False
    base: str = ""
    revision: str = ""
    init: str = ""

    @property
    def needs_changed_base(self) -> bool:
        """Whether it was trained on a base that its own initialisation had changed, and was saved without being converted.

        PEFT takes the initial B·A out of the base's weights then, when it trains and again when it loads (measured: used on
        the plain base, logits are off by 3 and more). A converted adapter says `init_lora_weights: true`.
        """
        return self.init.lower().startswith(_CHANGING)

    @property
    def is_lora(self) -> bool:
        """Whether it is of a kind that is made of A and B matrices."""
        return self.kind in _LORA_KINDS

    def scale(self, module: str, rank: int) -> float | None:
        """The factor s of a module's B·A: alpha/r, or alpha/√r of rsLoRA. None when alpha is not known.

        Args:
            module: its full name, without `base_model.model.`. rank: as its tensors have it.
        """
        if self.factor is not None:
            return self.factor
        key = _finder(self.alpha_pattern).find(module) if self.alpha_pattern else None
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        if alpha is None or rank < 1:
            return None
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_adapter_config(config: JsonObject) -> AdapterConfig:
    """Understand an adapter_config.json.

    Raises:
        WeftError: CORRUPT for numbers that no adapter has; HOSTILE for patterns that could keep us busy for ever.
    """
    mlx = _table(config, "lora_parameters")
    if mlx and "peft_type" not in config:
        kind = _text(config, "fine_tune_type").lower() or "lora"
        return AdapterConfig(
            kind="LORA" if kind in ("lora", "dora") else kind.upper(),
            rank=_whole(mlx.get("rank")),
            factor=_number(mlx.get("scale"), "scale"),
            dora=kind == "dora",
            tied=True,  # an adapted embedding is adapted where it serves as output head, too
            base=_text(config, "model"),
        )
    rank_pattern = {k: _whole(v) for k, v in _table(config, "rank_pattern").items()}
    alpha_pattern = {
        k: n for k, v in _table(config, "alpha_pattern").items() if (n := _number(v, "alpha_pattern")) is not None
    }
    for pattern in (*rank_pattern, *alpha_pattern):
        _check_pattern(pattern)
    if sum(1 for pattern in alpha_pattern if not _PLAIN.fullmatch(pattern)) > _EXPRESSIONS:
        raise WeftError(
            ErrorKind.HOSTILE,
            f"The adapter's config has more than {_EXPRESSIONS} expressions for names of modules.",
            "Write the full names of the modules into alpha_pattern.",
        )
    return AdapterConfig(
        kind=_text(config, "peft_type").upper() or "LORA",
        rank=_whole(config.get("r", config.get("init_r"))),
        alpha=_number(config.get("lora_alpha", config.get("alpha")), "lora_alpha"),
        rslora=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        lora_bias=config.get("lora_bias") is True,
        bias=_text(config, "bias") or "none",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=_texts(config.get("modules_to_save")),
        targets=_texts(config.get("target_modules")),
        target_parameters=_texts(config.get("target_parameters")),
        tokens=_tokens(config.get("trainable_token_indices", config.get("token_indices"))),
        layer_replication=_replication(config.get("layer_replication")),
        tied=config.get("ensure_weight_tying") is True,
        base=_text(config, "base_model_name_or_path"),
        revision=_text(config, "revision"),
        init=_text(config, "init_lora_weights")[:64],
    )


def pattern_key(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that a module's name ends with, as PEFT matches them; None when there is none."""
    finder = _finder(cast("Mapping[str, object]", patterns)) if isinstance(patterns, Mapping) else _Finder(patterns)
    return finder.find(module)


class _Finder:
    """Patterns ready to be asked for thousands of modules: names are looked up, only real expressions are tried."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, str, re.Pattern[str]]] = []
        for index, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                self._names.setdefault(pattern, index)
            else:
                self._expressions.append((index, pattern, re.compile(rf"(.*\.)?({pattern})$")))

    def find(self, module: str) -> str | None:
        best, found = 1 << 62, None
        start = 0
        while start >= 0:
            ending = module[start:]
            index = self._names.get(ending, best)
            if index < best:
                best, found = index, ending
            dot = module.find(".", start)
            start = dot + 1 if dot >= 0 else -1
        for index, pattern, expression in self._expressions:
            if index < best and expression.match(module):
                return pattern
        return found


_last: tuple[Mapping[str, object], _Finder] | None = None


def _finder(patterns: Mapping[str, object]) -> _Finder:
    """The finder of these very patterns, made once while one adapter is read."""
    global _last
    kept = _last
    if kept is None or kept[0] is not patterns:
        kept = _last = (patterns, _Finder(patterns))
    return kept[1]


def _check_pattern(pattern: str) -> None:
    if _PLAIN.fullmatch(pattern) and len(pattern) <= MAX_PATTERN:
        return
    # Repeated groups and many unbounded repeats are what makes matching take for ever.
    unbounded = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", pattern))
    try:
        re.compile(pattern)
        bad = len(pattern) > MAX_PATTERN or unbounded > 2 or re.search(r"\)[*+{]", pattern) is not None
    except (re.error, OverflowError, RecursionError):
        bad = True
    if bad:
        raise WeftError(
            ErrorKind.HOSTILE,
            f"The adapter's config has a pattern of module names that is not evaluated: {pattern[:60]!r}.",
            "Write the full names of the modules into rank_pattern and alpha_pattern.",
        )


def _table(config: Mapping[str, object], key: str) -> JsonObject:
    value = config.get(key)
    return cast("JsonObject", value) if isinstance(value, dict) else {}


def _text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(v for v in cast("list[object]", value) if isinstance(v, str)) if isinstance(value, list) else ()


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20 else 0


def _number(value: object, name: str) -> float | None:
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value) or abs(value) > 1e9:
        raise WeftError(
            ErrorKind.CORRUPT, f"The adapter's config has no sensible {name}: {value}.", "Get the adapter again."
        )
    return float(value)


def _tokens(value: object) -> dict[str, tuple[int, ...]]:
    """Trained rows by module: a plain list means the input embeddings, whatever these are called."""
    if isinstance(value, list):
        return {"": _indices(cast("list[object]", value))}
    if not isinstance(value, dict):
        return {}
    found = cast("JsonObject", value)
    return {k: _indices(cast("list[object]", v)) for k, v in found.items() if isinstance(v, list)}


def _indices(values: list[object]) -> tuple[int, ...]:
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _replication(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list) or not value:
        return ()
    ranges: list[tuple[int, int]] = []
    for item in cast("list[object]", value):
        pair = cast("list[object]", item) if isinstance(item, list) else []
        start, end = (pair[0], pair[1]) if len(pair) == 2 else (None, None)
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end < _LAYERS):
            raise WeftError(
                ErrorKind.CORRUPT, "The adapter's layer_replication is no list of ranges.", "Get the adapter again."
            )
        ranges.append((start, end))
    if sum(end - start for start, end in ranges) > _LAYERS:
        raise WeftError(
            ErrorKind.HOSTILE,
            f"The adapter's layer_replication makes more than {_LAYERS:,} layers.",
            "Get the adapter from somebody you trust.",
        )
    return tuple(ranges)
