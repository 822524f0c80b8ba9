"""What the card of a quantized model says."""

from __future__ import annotations

import re
from pathlib import Path

from app.core.quantize_plan import QuantizePlan


def quantized_card(plan: QuantizePlan, source: Path, tokens: int) -> str:
    """The card of a quantized model.

    Args:
        source: the 16-bit folder that was quantized: of a merge, its own card is taken over. tokens: it was calibrated on; 0 for none.
    """
    base = re.sub(r"[\r\n|`]", " ", plan.base_name or Path(plan.model).name)
    merged = source / "README.md" if source != Path(plan.model) else None
    lines = [
        "---",
        "library_name: transformers",
        "base_model:",
        f"- {base}",
        "tags:",
        f"- {plan.method}",
        "---",
        "",
    ]
    lines += [f"# {re.sub(r'[|`]', ' ', Path(plan.target).name)}", ""]
    lines += [
        f"{base}, quantized to {plan.bits} bits by {plan.method.upper()} (groups of {plan.group_size}"
        f"{', columns in order of importance' if plan.desc_act else ''}) by Weft"
        + (f", calibrated on {tokens:,} tokens of a text." if tokens else "."),
        "",
    ]
    if merged is not None and merged.is_file():
        text = merged.read_text("utf-8")
        lines += [
            "## Merged in",
            "",
            re.sub(r"\A---\n.*?\n---\n+(# [^\n]*\n+)?", "", text, flags=re.DOTALL).strip(),
            "",
        ]
    return "\n".join(lines)
