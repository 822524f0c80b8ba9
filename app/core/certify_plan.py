"""CertifyPlan: which two models to compare over a text; Certificate: what came out. Plain data."""

from __future__ import annotations

import msgspec

from app.core.stack import AdapterStack

LARGEST_TEXT = 64 * 1024 * 1024  # bytes that are read of a text file


class CertifySide(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two models.

    Attributes:
        model: a folder (safetensors or .bin), or a GGUF file.
        stack: adapters that are live on it.
        name: how it is called; "" for its folder's or file's name.
    """

    model: str
    stack: AdapterStack = AdapterStack()
    name: str = ""

    @property
    def is_gguf(self) -> bool:
        return self.model.lower().endswith(".gguf")


class CertifyPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to compare.

    Attributes:
        a, b: the models; KL is of A's predictions against B's.
        text: a text file in UTF-8.
        tokens: of it, at most.
        window: tokens that are read with what lies before them; the text is cut into windows of so many.
        store: the folder or file that the certificate is stored beside; "" for nowhere.
        together: hold both models in memory at once; None when they fit.
    """

    a: CertifySide
    b: CertifySide
    text: str
    tokens: int = 2048
    window: int = 512
    store: str = ""
    together: bool | None = None


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """How far two models are apart over the same tokens.

    Attributes:
        a, b: how the models are called, with their stacks.
        text: name of the text. text_sha256: of its bytes.
        predictions: how many tokens were predicted by both.
        largest_logit_difference: over all predictions and the whole vocabulary.
        mean_kl, largest_kl: of A's predictions against B's, in nats.
        top1_agreement: share of predictions where both have the same likeliest token, 0 to 1.
        perplexity_a, perplexity_b: over those predictions.
        window: tokens that were read together.
        notes: sentences worth showing. made: when, ISO 8601 in UTC. seconds: that it took.
        files: where it was stored.
    """

    a: str
    b: str
    text: str
    text_sha256: str
    predictions: int
    largest_logit_difference: float
    mean_kl: float
    largest_kl: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float
    window: int
    notes: list[str] = []
    made: str = ""
    seconds: float = 0.0
    files: list[str] = []


# Mean KL in nats under which two models are as good as one, and under which the loss is small. See docs/export.md.
SAME_KL, SMALL_KL = 0.01, 0.1


def verdict(found: Certificate) -> str:
    """What the figures of a certificate mean, in a sentence."""
    if found.mean_kl < SAME_KL:
        return "Practically the same: you will hardly notice a difference."
    if found.mean_kl < SMALL_KL:
        return "A small difference: the answers differ now and then in their words."
    return "It differs clearly: try it before you rely on it, or choose a larger type or more bits."


def environment_of(a: CertifySide, b: CertifySide) -> str:
    """The smallest environment in which both models can be loaded."""
    if a.is_gguf and b.is_gguf:
        return "llamacpp"
    return "export" if a.is_gguf or b.is_gguf else "core"


def lines(found: Certificate) -> list[str]:
    """A certificate in words, a fact a line: first which models, then what the figures mean."""
    return [
        f"A: {found.a}",
        f"B: {found.b}",
        verdict(found),
        f"text: {found.text}, {found.predictions:,} predictions in windows of {found.window} tokens",
        f"largest logit difference: {found.largest_logit_difference:.3g}",
        f"mean KL(A‖B): {found.mean_kl:.3g} nats (largest {found.largest_kl:.3g})",
        f"same likeliest token: {100 * found.top1_agreement:.2f} %",
        f"perplexity: {found.perplexity_a:.4f} (A), {found.perplexity_b:.4f} (B)",
    ]


def section(found: Certificate) -> str:
    """A certificate as a section of a model card, in Markdown."""
    body = "\n".join(f"- {line}" for line in [*lines(found), *found.notes])
    return f"\n## Certificate\n\nBoth models read the same tokens ({found.made}).\n\n{body}\n"
