"""How the commands that make a model of a model (`merge`, `quantize`, `export`) tell what they made."""

from __future__ import annotations

import argparse
import sys

from app.cli_certify import certified_json, certify_result
from app.core.certify_plan import CertifySide
from app.core.export_plan import ExportResult
from app.core.merge_plan import MergeResult
from app.core.quantize_plan import QuantizeResult


def tell(
    parsed: argparse.Namespace,
    made: MergeResult | QuantizeResult | ExportResult,
    path: str,
    sentence: str,
    base: CertifySide,
    *,
    environment: str = "",
) -> None:
    """Its notes on stderr; on stdout the sentence, or with `--json` one document; with `--certify` its certificate too.

    Args:
        path: the folder or file that was made. base: the model and the stack that it was made of.
        environment: one that is there and loads both; "" for the smallest that does.

    Raises:
        WeftError: what certifying raises.
    """
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if not parsed.json:
        print(sentence)
    found = None
    if parsed.certify is not None:
        found = certify_result(base, path, parsed.certify, quiet=parsed.json, environment=environment)
    if parsed.json:
        print(certified_json(made, found))
