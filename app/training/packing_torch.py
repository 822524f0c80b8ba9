"""Does packing keep sequences apart in this model? Tried before each run, since it fails silently where it fails.

Position ids that begin anew separate sequences in most of transformers' models (with use_cache=False and no attention mask),
an explicit block-diagonal mask in some others; models that place tokens by their attention mask (Bloom, Falcon, OPT) and
those with a running state (Mamba) let sequences see each other either way. What is measured:

- random sequences packed, against the same ones alone: the mean loss of each has to agree;
- the packed row with its first sequence replaced: nothing may change behind it.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from app.training.collate_torch import Collator, Mode
from app.training.data_config import DataConfig
from app.training.encode import Example

TOLERANCE = 1e-4  # nats a token
_COARSE = 0.03  # the same in 16-bit arithmetic, which rounds rows of other lengths otherwise; the second measurement is exact there too
_LONGEST = 48


class PackingCheck(NamedTuple):
    """How sequences are kept apart, for `Collator`.

    Attributes:
        mode: see `Collator`. difference: nats that separate packed from unpacked losses, in the mode that was taken or,
            for `off`, in the best one. reason: a sentence for people.
    """

    mode: Mode
    difference: float
    reason: str
    mask_dtype: torch.dtype = torch.float32


def check_packing(model: Any, config: DataConfig, seed: int | None = None) -> PackingCheck:
    """Find the way to pack that is right for this model, or that there is none.

    Args:
        model: as it is trained, adapter included; its modes and random state are left as they are.
        config: says whether packing is wanted, and how long rows become.
        seed: of the random sequences; None for fresh ones.
    """
    if config.packing == "off":
        return PackingCheck("off", 0.0, "Packing is switched off.")
    sequences = _sequences(model, config, random.Random(seed))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    best: tuple[float, str] | None = None
    with still(model), torch.no_grad():
        alone = [_losses(model, sequences, [(n,)], "off", dtype)[0] for n in range(len(sequences))]
        allowed = _COARSE if dtype in (torch.float16, torch.bfloat16) else TOLERANCE
        for mode in ("positions", "mask"):
            if mode == "mask" and _window(model) and config.max_length > _window(model):
                continue  # one mask for all layers would widen the sliding window
            try:
                apart, changed = _measure(model, sequences, alone, mode, dtype)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                words = next(iter(str(error).splitlines()), type(error).__name__)[:120]
                best = best or (float("inf"), f"it does not take what separates sequences ({words})")
                continue
            difference = max(apart, changed)
            if apart <= allowed and changed <= TOLERANCE:
                return PackingCheck(
                    mode, difference, f"Packed losses equal unpacked ones within {difference:.1e}.", dtype
                )
            if best is None or difference < best[0]:
                best = (difference, f"sequences that share a row change each other's loss by {difference:.2g}")
    assert best is not None
    return PackingCheck(
        "off", best[0], f"Packing is off for this model: {best[1]}. Examples are sorted by length and padded instead."
    )


def _measure(
    model: Any, sequences: list[Example], alone: list[torch.Tensor], mode: Mode, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference of a sequence's mean loss from that alone, and of any token's when the first sequence changes."""
    rest = tuple(range(1, len(sequences)))
    packed = _losses(model, sequences, [(0, *rest)], mode, dtype)
    apart = max(abs(a.mean() - b.mean()).item() for a, b in zip(alone, packed, strict=True))
    other = Example(array("i", reversed(sequences[0].input_ids)), sequences[0].labels, 0, 0, b"")
    swapped = _losses(model, [other, *sequences[1:]], [(0, *rest)], mode, dtype)
    changed = max((a - b).abs().max().item() for a, b in zip(packed[1:], swapped[1:], strict=True))
    if not (apart < float("inf") and changed < float("inf")):
        return float("inf"), float("inf")  # no number at all
    return apart, changed


def _losses(
    model: Any, sequences: list[Example], batch: list[tuple[int, ...]], mode: Mode, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Negative log-likelihoods (float32 [length - 1]) of the sequences of a batch, in order."""
    device = next(model.parameters()).device
    tensors = Collator(sequences, 0, mode=mode, mask_dtype=dtype)(batch)
    labels = tensors.pop("labels")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    logits = model(**tensors, use_cache=False).logits.float().log_softmax(-1).cpu()
    found: list[torch.Tensor] = []
    for row, pack in enumerate(batch):
        at = 0
        for number in pack:
            end = at + len(sequences[number].input_ids)
            targets = labels[row, at + 1 : end, None]
            found.append(-logits[row, at : end - 1].gather(-1, targets)[:, 0])
            at = end
    return found


def _sequences(model: Any, config: DataConfig, rng: random.Random) -> list[Example]:
    """Three random sequences of ordinary tokens, of different lengths, that fit into one row."""
    settings = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    size = int(getattr(settings, "vocab_size", 0)) or model.get_input_embeddings().weight.shape[0]
    special = {
        value
        for key, value in vars(model.config).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ordinary = [token for token in rng.sample(range(size), min(size, 512)) if token not in special] or [0]
    limit = min(int(getattr(settings, "max_position_embeddings", 0) or 1 << 30), config.max_length)
    longest = max(4, min(_LONGEST, limit // 3))
    lengths = rng.sample(range(longest // 2, longest + 1), 3) if longest >= 6 else [3, 3, 3]
    made: list[Example] = []
    for length in lengths:
        ids = array("i", (rng.choice(ordinary) for _ in range(length)))
        made.append(Example(ids, ids[:], 0, 0, b""))
    return made


def _window(model: Any) -> int:
    settings = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(settings, "sliding_window", 0) or 0)


@contextmanager
def still(model: Any) -> Iterator[None]:
    """Without dropout, but in the mode that the model is in.

    eval() would be simpler, and would make some quantized layers repack their weights for inference, for good.
    """
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.Dropout) else []
        names += [
            name
            for name in ("attention_dropout", "dropout", "layerdrop")
            if isinstance(getattr(module, name, None), float)
        ]
        for name in names:
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
