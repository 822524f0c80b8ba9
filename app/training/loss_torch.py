"""Cross-entropy without all logits at once: the output head is applied to some trained tokens at a time.

With a vocabulary of 128,000, the logits of 2,048 tokens and what their gradient needs are 3 GB; in pieces they are a
few megabytes. Masked tokens never reach the head at all. The gradient is taken piece by piece while the loss is computed, so that
nothing is computed twice. The model is called as always, wrappers and hooks included; only its output head is made to hand
over what it is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from app.training.distributed_torch import shared
from app.training.packing_torch import still

IGNORED = -100
PIECE_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}  # of float32 logits at once
_HALF_SCALE = 1024.0  # keeps small gradients of float16 logits from vanishing before the loss scaler comes to them
_TOLERANCE = 1e-3

Finish = Callable[[torch.Tensor], torch.Tensor]  # what a model does to its logits behind the head
_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def sft_chunked(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor | None:
    """The sum of the cross-entropies (nats) of all trained tokens, float32; equal to that over the model's own logits.

    Args:
        model: a causal language model of transformers, with or without PEFT's adapter, DDP or FSDP2 around it.
        inputs: what it takes, without labels. labels: int64 [rows, length], unshifted, -100 where nothing is learnt.

    Returns:
        The loss, or None where the model's head cannot be taken apart from it (no such head, logits that are treated
        in a way that is not known here): tried once for each model, on a few tokens; for FSDP by `try_head`.
    """
    causal = _causal(model)
    head = _head(causal)
    sharded = hasattr(model, "unshard")
    if head is None or (sharded and not _can_gather(head)):
        return None
    finish = _finish(causal)
    if not sharded and causal not in _known:
        _known[causal] = _agrees(causal, head, finish, inputs)
    if not _known.get(causal, False):
        return None
    with _captured(head) as seen:
        output = model(**inputs, use_cache=False)
    if sharded:
        return _sharded_loss(output.logits, seen[0], labels, head, finish)
    del output
    hidden = seen[0][:, :-1]
    wanted = labels[:, 1:].to(hidden.device)
    at = (wanted != IGNORED).nonzero(as_tuple=True)
    return chunked_loss(hidden[at], wanted[at], head, finish)


def try_head(model: Any, tokens: Sequence[int], accelerator: Any = None) -> None:
    """Find out whether the head can be taken apart from a model which FSDP is about to share out.

    Processors of different make may round to different verdicts, and a head is gathered by all processes or by none: the
    first one's counts. All of them ask.
    """
    causal = _causal(model)
    head = _head(causal)
    if head is not None:
        few = torch.tensor([list(tokens[:8])], device=next(causal.parameters()).device)
        _known[causal] = shared(accelerator, _agrees(causal, head, _finish(causal), {"input_ids": few}))


def _sharded_loss(
    logits: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, head: Any, finish: Finish
) -> torch.Tensor:
    """The loss where FSDP shares the model out: its hooks stay out of the head, whose weights are gathered once.

    Args:
        logits: of the captured head, worth nothing; they are in the loss, times nought, since FSDP begins its backward pass
            where that reaches the model's output.
    """
    hidden = hidden[:, :-1]
    wanted = labels[:, 1:].to(hidden.device)
    at = (wanted != IGNORED).nonzero(as_tuple=True)
    head.unshard()
    loss = chunked_loss(hidden[at], wanted[at], head.forward, finish)
    return loss + logits.float().sum() * 0.0


def chunked_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: Any, finish: Finish = lambda logits: logits, rows: int = 0
) -> torch.Tensor:
    """Sum of cross-entropies of `finish(head(hidden))`, rows by rows.

    Args:
        hidden: [tokens, width]. targets: int64 [tokens]. head: a module; its parameters get gradients where they want them.
        rows: tokens at once; 0 for as many as PIECE_BYTES allows.
    """
    if not len(targets):
        return hidden.float().sum() * 0.0
    if not torch.is_grad_enabled():
        return _forward(hidden, targets, head, finish, rows)[0]
    return _Chunked.apply(hidden, targets, head, finish, rows, *_leaves(head, hidden))  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one go; backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Any, finish: Finish, rows: int, *leaves: Any
    ) -> torch.Tensor:
        loss, gradients = _forward(hidden, targets, head, finish, rows, hidden.requires_grad, leaves)
        ctx.save_for_backward(*gradients)
        ctx.has_hidden = hidden.requires_grad
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        gradients = [gradient * outer[0].to(gradient.dtype) for gradient in ctx.saved_tensors]
        first = gradients.pop(0) if ctx.has_hidden else None
        return (first, None, None, None, None, *gradients)


def _forward(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Any,
    finish: Finish,
    rows: int,
    wanted: bool = False,
    leaves: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the gradients of `hidden` (when wanted) and of the leaves."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    into = torch.empty_like(hidden) if wanted else None
    sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    scale = _HALF_SCALE if hidden.dtype == torch.float16 else 1.0
    rows = rows or _rows(head, hidden)
    for start in range(0, len(targets), rows):
        part = hidden[start : start + rows].detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted or bool(leaves)):
            logits = finish(head(part)).float()
            loss = functional.cross_entropy(logits, targets[start : start + rows], reduction="sum")
            scaled = loss * scale
        total += loss.detach()
        needed = ([part] if wanted else []) + list(leaves)
        if not needed:
            continue
        found = list(torch.autograd.grad(scaled, needed, allow_unused=True))
        if into is not None:
            first = found.pop(0)
            into[start : start + rows] = 0 if first is None else first / scale
        for total_of, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total_of += gradient.float() / scale
    typed = [total_of.to(leaf.dtype) for total_of, leaf in zip(sums, leaves, strict=True)]
    return total, ([into] if into is not None else []) + typed


def _rows(head: Any, hidden: torch.Tensor) -> int:
    with torch.no_grad():
        vocabulary = head(hidden[:1]).shape[-1]
    budget = PIECE_BYTES.get(hidden.device.type, PIECE_BYTES["cuda"])
    return max(16, budget // (4 * vocabulary))


def _leaves(head: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The trainable tensors that a head's output comes from, wherever they are registered (tied embeddings, adapters)."""
    with torch.enable_grad():
        node = head(hidden[:1].detach()).grad_fn
    found: dict[int, torch.Tensor] = {}
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    return tuple(found.values())


@contextmanager
def _captured(head: Any) -> Iterator[list[torch.Tensor]]:
    """Let a head hand over what it is given, and give back next to nothing."""
    seen: list[torch.Tensor] = []
    own = head.__dict__.get("forward")

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(hidden)
        return hidden[..., :1].clone()  # no view: FSDP hangs its hooks on it

    head.forward = forward
    try:
        yield seen
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _causal(model: Any) -> Any:
    """transformers' model inside the wrappers."""
    inner = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module  # DDP
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _head(causal: Any) -> Any:
    return causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None


def _can_gather(head: Any) -> bool:
    """Whether a head that FSDP shares out is a unit of its own, and nothing of it is trained (no gradients to share out)."""
    return hasattr(head, "unshard") and not any(parameter.requires_grad for parameter in head.parameters())


def _finish(causal: Any) -> Finish:
    """What transformers' models do to logits, as their configs say it; the trial tells whether it is all."""
    config = causal.config.get_text_config(decoder=True) if hasattr(causal.config, "get_text_config") else causal.config
    cap = getattr(config, "final_logit_softcapping", None)
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    factor *= float(getattr(config, "lm_head_multiplier", None) or 1.0)

    def finish(logits: torch.Tensor) -> torch.Tensor:
        if factor != 1.0:
            logits = logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish


def _agrees(causal: Any, head: Any, finish: Finish, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the head and `finish` give the model's own logits, on a few of the batch's first tokens."""
    few = inputs["input_ids"][:1, :8]
    with torch.no_grad(), still(causal):
        logits = causal(input_ids=few, use_cache=False).logits
        with _captured(head) as seen:
            causal(input_ids=few, use_cache=False)
        if len(seen) != 1 or seen[0].shape[:2] != few.shape:
            return False
        ours = finish(head(seen[0]))
        if ours.shape != logits.shape:
            return False
        scale = logits.float().abs().max().clamp(min=1.0)
        allowed = _TOLERANCE if logits.dtype == torch.float32 else 0.02
        return bool((ours.float() - logits.float()).abs().max() <= allowed * scale)
