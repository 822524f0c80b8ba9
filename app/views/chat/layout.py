"""How messages are laid out in a document: distances, and the properties by which blocks are told apart."""

from __future__ import annotations

from PySide6.QtGui import QTextFormat

CODE_ID = QTextFormat.Property.UserProperty.value + 1  # of a code line: which code block it belongs to
QUOTE_DEPTH = QTextFormat.Property.UserProperty.value + 2
RULE = QTextFormat.Property.UserProperty.value + 3
CODE_HEADER = 28  # pixels above the first line, where the language and the copy button stand
CODE_PADDING = 8
PARAGRAPH = 10  # pixels between paragraphs
INDENT = 24
