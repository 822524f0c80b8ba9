"""The parser of one command: options may stand between arguments, as people type them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A parser that takes `weft import A --alpha 8 B`; argparse alone calls B unknown, since A was all of the paths."""

    _mixing = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's; what an argument of many values takes need not stand together."""
        if self._mixing or not any(a.nargs in ("+", "*") and not a.option_strings for a in self._actions):
            return super().parse_known_args(args, namespace)
        self._mixing = True  # the library comes back here for each of its two passes
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False
