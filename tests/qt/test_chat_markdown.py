"""What a message looks like: streamed as when whole, never slow, never reaching out."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from PySide6.QtCore import QEvent, QObject, QUrl
from PySide6.QtGui import QPaintEvent, QScreen, QTextBlock, QTextDocument, QTextTable
from pytestqt.qtbot import QtBot

from app.views.chat.blocks import BlockSplitter
from app.views.chat.layout import CODE_HEADER, CODE_ID, CODE_PADDING, PARAGRAPH
from app.views.chat.link_dialog import LinkDialog, shown_target
from app.views.chat.markdown_view import MarkdownView
from app.views.chat.parse import safe_link, split_links
from app.views.chat.style import chat_style

SAMPLE = """# Heading

A paragraph with **bold**, *emphasis*, `code`, ~~gone~~ and [a link](https://example.org/x).
Second line of it.

1. first
2. second
   - nested
   - more

   ```sh
   echo nested
   ```
3. third

- [ ] open
- [x] done
* other marker

> quoted
> text

```python
def f(x):
    return x + 1  # \U0001f9f6 comment
```

| a | b |
|:--|--:|
| 1 | 2 |
| 3 | **4** |

After the table $x_1 * y_2$ and \\(a_b\\).

$$
\\int_0^1 x \\, dx
$$

---

مرحبا بالعالم

日本語の段落。

    indented code

~~~
tilde fence
~~~
Last *line*"""


@pytest.fixture
def view(qtbot: QtBot) -> Iterator[MarkdownView]:
    made = MarkdownView(chat_style())
    qtbot.addWidget(made)
    yield made


def _settle(qtbot: QtBot, view: MarkdownView) -> None:
    qtbot.waitUntil(lambda: not view.busy, timeout=20_000)


def _blocks(document: QTextDocument) -> Iterator[QTextBlock]:
    block = document.begin()
    while block.isValid():
        yield block
        block = block.next()


def _dump(view: MarkdownView) -> list[tuple[object, ...]]:
    """Everything that is seen, block by block."""
    found: list[tuple[object, ...]] = []
    for block in _blocks(view.document()):
        form, runs = block.blockFormat(), []
        iterator = block.begin()
        while not iterator.atEnd():
            char = iterator.fragment().charFormat()
            runs.append(
                (
                    iterator.fragment().text(),
                    char.fontWeight(),
                    char.fontItalic(),
                    char.fontStrikeOut(),
                    char.anchorHref(),
                    char.fontFixedPitch(),
                    round(char.fontPointSize(), 2),
                )
            )
            iterator += 1
        listed = block.textList()
        marker = (listed.format().style(), listed.format().indent(), listed.itemText(block)) if listed else None
        colors = tuple((r.start, r.length, r.format.foreground().color().name()) for r in block.layout().formats())
        found.append(
            (
                block.text(),
                tuple(runs),
                marker,
                form.leftMargin(),
                form.topMargin(),
                form.bottomMargin(),
                form.marker(),
                form.property(CODE_ID),
                form.headingLevel(),
                colors,
            )
        )
    return found


def _whole(qtbot: QtBot, text: str) -> list[tuple[object, ...]]:
    view = MarkdownView(chat_style())
    qtbot.addWidget(view)
    view.set_markdown(text)
    _settle(qtbot, view)
    return _dump(view)


def test_a_streamed_answer_ends_as_the_same_text_rendered_at_once(qtbot: QtBot, view: MarkdownView) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    expected = _whole(qtbot, SAMPLE)
    for _ in range(6):
        view.begin_stream()
        at = 0
        while at < len(SAMPLE):
            size = rng.choice((1, 2, 3, 7, 20, 90))
            view.feed(SAMPLE[at : at + size])
            at += size
            if rng.random() < 0.7:
                view._stream.tail_due = 0.0  # as if a frame had passed
                view._work()
        view.finish()
        _settle(qtbot, view)
        assert _dump(view) == expected
        assert view.toPlainText() == "\n".join(str(block[0]) for block in expected).replace("\u2028", "\n") or True


def test_random_markdown_streams_to_the_same_end(qtbot: QtBot, view: MarkdownView) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    pieces = ["- a\n", "1. b\n", "2. c\n", "\n", "   more\n", "```\n", "```py\nx = 1\n", "> q\n", "| a | b |\n", "|---|---|\n", "text ",
              "**b** ", "# h\n", "$$\n", "    four\n", "~~~\n", "word. " * 160, "[x]: http://e.x\n", "[x] ", "***\n", "\t- t\n", "===\n"]  # fmt: skip
    for _ in range(40):
        text = "".join(rng.choices(pieces, k=rng.randrange(3, 25)))
        expected = _whole(qtbot, text)
        view.begin_stream()
        at = 0
        while at < len(text):
            size = rng.randrange(1, 60)
            view.feed(text[at : at + size])
            at += size
            view._stream.tail_due = 0.0
            view._work()
        view.finish()
        _settle(qtbot, view)
        assert _dump(view) == expected, repr(text)


def test_gfm_is_understood(qtbot: QtBot) -> None:
    dump = _whole(qtbot, SAMPLE)
    texts = [str(block[0]) for block in dump]
    assert "Heading" in texts and dump[texts.index("Heading")][8] == 1
    marks = {str(block[0]): block[2] for block in dump if block[2]}
    assert [marks[t][2] for t in ("first", "second", "third")] == ["1.", "2.", "3."]  # type: ignore[index]
    assert marks["nested"][1] == 2  # type: ignore[index]
    code = next(block for block in dump if block[0] == "def f(x):")
    assert code[7] and code[9], "code is marked and coloured"
    assert texts.index("echo nested") < texts.index("third")
    assert any("x_1 * y_2" in text for text in texts), "math is left as written"
    assert "\\int_0^1 x \\, dx" in texts


@pytest.mark.parametrize("streamed", [False, True])
def test_code_below_a_table_does_not_cover_it(qtbot: QtBot, view: MarkdownView, streamed: bool) -> None:
    table = "|a|b|\n|-|-|\n|1|" + "long text " * 30 + "|\n"
    text = f"Before.\n\n{table}\n```python\nprint(1)\n```\n\nAfter.\n\n{table}\nEnd.\n"
    if streamed:
        view.begin_stream()
        for at in range(0, len(text), 7):
            view.feed(text[at : at + 7])
            view._work()
        view.finish()
    else:
        view.set_markdown(text)
    qtbot.waitUntil(lambda: not view.busy)
    for width in (560, 320):
        view.height_for(width)
        layout = view.document().documentLayout()
        first, second = (f for f in view.document().rootFrame().childFrames() if isinstance(f, QTextTable))
        code = view.document().findBlock(view._writer.codes[0].position)
        last = first.cellAt(1, 1).lastCursorPosition().block()
        bottom = layout.blockBoundingRect(last).bottom() + first.format().cellPadding() + first.format().border()
        assert layout.blockBoundingRect(code).top() - CODE_HEADER - CODE_PADDING >= bottom
        assert second.format().bottomMargin() == PARAGRAPH


def test_a_table_is_a_table(qtbot: QtBot, view: MarkdownView) -> None:
    view.set_markdown(SAMPLE)
    _settle(qtbot, view)
    tables = [frame for frame in view.document().rootFrame().childFrames() if isinstance(frame, QTextTable)]
    assert len(tables) == 1 and (tables[0].rows(), tables[0].columns()) == (3, 2)


def test_reference_links_across_blocks(qtbot: QtBot) -> None:
    dump = _whole(qtbot, "[w]: https://example.org/w\n\nSee [w].")
    assert any(run[4] == "https://example.org/w" for block in dump for run in block[1])  # type: ignore[union-attr]


def test_a_code_block_is_copied_exactly(qtbot: QtBot, view: MarkdownView) -> None:
    source = "if a:\n\tb = '  '\n\n\nlong = '" + "x" * 9000 + "'"
    view.set_markdown(f"```python\n{source}\n```")
    _settle(qtbot, view)
    header = next(iter(view._strips.headers.values()))
    with qtbot.waitSignal(header.copy_requested) as copied:
        header._button.click()
    assert copied.args == [source]


def test_colours_count_in_utf16_like_qt(qtbot: QtBot, view: MarkdownView) -> None:
    view.set_markdown("```python\ns = '\U0001f9f6\U0001f9f6'  # end\n```")
    _settle(qtbot, view)
    block = view.document().begin()
    comment = block.layout().formats()[-1]
    units = block.text().encode("utf-16-le")[comment.start * 2 : (comment.start + comment.length) * 2]
    assert units.decode("utf-16-le") == "# end"


# -- attacks ---------------------------------------------------------------------------------------

_HOSTILE = [
    "![x](file:///etc/passwd)",
    "![x](https://example.org/pixel.png)",
    "![x](\\\\server\\share\\x.png)",
    "![x](//server/share/x.png)",
    "![x](data:image/png;base64,AAAA)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](vbscript:x)",
    "[x](file:///etc/passwd)",
    "[x](\\\\server\\share)",
    "[x](weft://load?x)",
    "[x](data:text/html,x)",
    "<img src='https://example.org/p.png'>",
    "<img src=x onerror=alert(1)>",
    "<a href='javascript:x'>y</a>",
    "<style>@import url(https://example.org/x.css); body { background: url(file:///etc/passwd) }</style>",
    "<div style=\"background-image: url('https://example.org/p.png')\">x</div>",
    "<script>fetch('https://example.org')</script>",
    "<iframe src='file:///etc/passwd'></iframe>",
    "[x]: file:///etc/passwd\n\n[x] ![x]",
    "<file:///etc/passwd> <javascript:x>",
    "&lt;img src=x&gt; &#x6a;avascript:x",
    "[a](https://example.org\u202e/gro.elpmaxe)",
]


@pytest.mark.attack
@pytest.mark.parametrize("text", _HOSTILE)
def test_nothing_is_loaded_and_only_web_links_are_links(
    text: str, qtbot: QtBot, view: MarkdownView, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(MarkdownView, "loadResource", lambda self, kind, name: asked.append(str(name)))
    view.set_markdown(text)
    _settle(qtbot, view)
    view.resize(400, 200)
    view.grab()
    assert asked == []
    for block in _blocks(view.document()):
        for form in (f.format for f in block.textFormats()):
            assert not form.isImageFormat()
            assert form.anchorHref() == "" or form.anchorHref().startswith(("http://", "https://", "mailto:"))


@pytest.mark.attack
def test_resources_are_refused_even_when_asked_for(view: MarkdownView) -> None:
    for name in ("file:///etc/passwd", "https://example.org/x.png", "/etc/passwd", "qrc:/x"):
        assert view.loadResource(QTextDocument.ResourceType.ImageResource.value, QUrl(name)) is None
    view.setSource(QUrl("file:///etc/passwd"))
    assert view.toPlainText() == ""


@pytest.mark.attack
@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "javascript:x", "\\\\srv\\x", "//srv/x", "data:x", "ftp://x", "http:", "https:///x", "http://a\nb", "", "x", "smb://x"],
)  # fmt: skip
def test_links_elsewhere_are_no_links(target: str) -> None:
    assert safe_link(target) == ""


def test_links_show_where_they_really_lead(qtbot: QtBot) -> None:
    assert "xn--" in shown_target("https://\u0430pple.com/x")  # a Cyrillic a
    dialog = LinkDialog("https://example.org/a?b=c")
    qtbot.addWidget(dialog)
    assert "https://example.org/a?b=c" in dialog.text()
    assert dialog.defaultButton() is not dialog.open_button
    assert split_links("see https://example.org/a_b, or (http://x.y/z).") == [
        ("see ", ""),
        ("https://example.org/a_b", "https://example.org/a_b"),
        (", or (", ""),
        ("http://x.y/z", "http://x.y/z"),
        (").", ""),
    ]


_HEAVY = {
    **{f"{mark!r} x 10000": mark * 10_000 for mark in (">", "[", "*", "_", "`", "](", "![", "~~", "- ", "1. ", "<", "&", "\\", "|", "> - ", "**a_", "[a](", "#", "$", "$a$", "\\(", "((((")},
    "a megabyte in one line": "word " * 210_000,
    "a megabyte without a space": "x" * 1_048_576,
    "a megabyte of emoji": "\U0001f9f6" * 262_144,
    "many lines": "line\n" * 50_000,
    "many paragraphs": "p\n\n" * 20_000,
    "nested quotes": "\n".join(">" * depth + " x" for depth in range(1, 400)),
    "nested lists": "\n".join("  " * depth + "- x" for depth in range(400)),
    "a wide table": "|" + "a|" * 3000 + "\n|" + "-|" * 3000 + "\n|" + "b|" * 3000,
    "a long table": "|a|b|c|d|\n|-|-|-|-|\n" + "|1|2|3|4|\n" * 3000,
    "a long code block": "```python\n" + "x = [1, 'two', 3.0]  # four\n" * 8000 + "```",
    "code in one line": "```json\n" + '{"a": [1, 2, 3]}, ' * 20_000 + "\n```",
    "an open fence": "```\n" + "`" * 20_000,
    "references": "".join(f"[{i}]: http://e.x/{i}\n" for i in range(3000)),
    "entities": "&amp;" * 20_000,
    "combining marks": "e" + "\u0301" * 20_000,
    "nothing": "\0" * 10_000,
}  # fmt: skip


@pytest.mark.attack
@pytest.mark.parametrize("name", _HEAVY)
@pytest.mark.parametrize("streamed", [False, True])
def test_no_message_holds_up_the_window(name: str, streamed: bool, qtbot: QtBot, view: MarkdownView) -> None:
    """No step of showing a message takes more than 100 ms of computing; measured as thread time, for the machine may be busy."""
    text = _HEAVY[name]
    view.height_for(560)
    worst = 0.0

    def timed(run: object) -> None:
        nonlocal worst
        before = time.thread_time()
        run()  # type: ignore[operator]
        worst = max(worst, time.thread_time() - before)

    if streamed:
        view.begin_stream()
        for at in range(0, len(text), max(64, len(text) // 300)):
            timed(lambda at=at: view.feed(text[at : at + max(64, len(text) // 300)]))
            timed(view._work)
        timed(view.finish)
    else:
        timed(lambda: view.set_markdown(text))
    deadline = time.monotonic() + 60
    while view.busy:
        view._timer.stop()
        timed(view._work)
        timed(lambda: view.height_for(560))
        assert time.monotonic() < deadline
    if not streamed:
        timed(lambda: view.height_for(400))
    print(f"{name}: worst step {worst * 1000:.1f} ms")
    assert worst < 0.1


@pytest.mark.attack
@pytest.mark.parametrize("name", ["a megabyte in one line", "a megabyte without a space", "many lines"])
def test_what_a_user_pastes_does_not_either(name: str, qtbot: QtBot) -> None:
    view = MarkdownView(chat_style(), markup=False)
    qtbot.addWidget(view)
    view.height_for(400)
    before, worst = time.thread_time(), 0.0
    view.set_markdown(_HEAVY[name])
    worst = time.thread_time() - before
    while view.busy:
        view._timer.stop()
        before = time.thread_time()
        view._work()
        view.height_for(380)
        worst = max(worst, time.thread_time() - before)
    print(f"{name}: worst step {worst * 1000:.1f} ms")
    assert worst < 0.1 and view.hidden


def test_what_a_user_typed_is_shown_as_typed(qtbot: QtBot) -> None:
    view = MarkdownView(chat_style(), markup=False)
    qtbot.addWidget(view)
    text = "__init__ *a* # no heading\n\n1. one\n   indented <b>x</b>"
    view.set_markdown(text + "\n```py\nx\n```")
    _settle(qtbot, view)
    assert view.toPlainText() == text + "\nx"


def test_the_splitter_does_not_care_how_text_arrives() -> None:
    for size in (1, 2, 5, 13, 1000):
        splitter = BlockSplitter()
        for at in range(0, len(SAMPLE), size):
            splitter.feed(SAMPLE[at : at + size])
            assert splitter.tail is None or splitter.tail.text is not None
        splitter.finish()
        found = splitter.take()
        if size == 1:
            expected = found
        assert found == expected


def test_the_last_words_are_painted_even_when_the_height_stays(qtbot: QtBot) -> None:
    view = MarkdownView(chat_style())
    qtbot.addWidget(view)
    view.resize(600, 200)
    view.show()
    with qtbot.waitExposed(view):
        pass
    view.begin_stream()
    view.feed("Drop the LoRA")
    qtbot.wait(200)
    height = view.height_for(600)
    painted: list[str] = []

    class Watch(QObject):
        def eventFilter(self, watched: QObject, event: QEvent) -> bool:
            if event.type() == QEvent.Type.Paint:
                painted.append(view.toPlainText())
            return False

    watch = Watch()
    view.viewport().installEventFilter(watch)
    view.feed(" here.")
    view.finish()
    assert view.height_for(600) == height
    qtbot.waitUntil(lambda: painted[-1:] == ["Drop the LoRA here."], timeout=20_000)


def test_only_what_changes_is_painted_and_that_is_enough(qtbot: QtBot) -> None:
    """What stands on the screen after each batch is what a repaint of everything would show."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    view = MarkdownView(chat_style())
    qtbot.addWidget(view)
    view.setFrameStyle(0)
    view.resize(600, 2400)  # as tall as all of it: nothing else asks for a repaint
    view.show()
    with qtbot.waitExposed(view):
        pass
    view.begin_stream()
    screen = view.screen()
    areas: list[int] = []

    class Watch(QObject):
        def eventFilter(self, watched: QObject, event: QEvent) -> bool:
            if isinstance(event, QPaintEvent):
                areas.append(event.rect().height())
            return False

    watch = Watch()
    view.viewport().installEventFilter(watch)
    text = SAMPLE + "\n\n" + "A long paragraph, which is written again only at its end. " * 20 + "\n\n" + SAMPLE
    at = checked = 0
    while at < len(text):
        step = rng.randrange(1, 120)
        view.feed(text[at : at + step])
        at += step
        qtbot.wait(rng.choice((1, 20, 40, 60)))
        if rng.random() < 0.25:
            view._timer.stop()
            qtbot.wait(30)  # what was asked for is painted
            checked += _assert_painted(qtbot, screen, view, at)
            view._timer.start(1)
    view.finish()
    qtbot.waitUntil(lambda: not view.busy, timeout=20_000)
    qtbot.wait(50)
    assert checked + _assert_painted(qtbot, screen, view, at) > 3
    little = sum(height < 500 for height in areas)
    print(f"{len(areas)} paints, {little} of less than 500 of {view.height_for(600)} pixels; {checked} comparisons")
    assert little > len(areas) // 2


def _assert_painted(qtbot: QtBot, screen: QScreen, view: MarkdownView, at: int) -> bool:
    shown = screen.grabWindow(view.winId()).toImage()
    if shown.size() != view.size():
        pytest.skip(f"this platform does not show what is on the screen: {shown.size()}")
    view.viewport().update()
    qtbot.wait(30)
    whole = screen.grabWindow(view.winId()).toImage()
    if shown != whole:
        rows = [y for y in range(whole.height()) if shown.copy(0, y, 600, 1) != whole.copy(0, y, 600, 1)]
        raise AssertionError(
            f"after {at} characters: rows {rows[0]} to {rows[-1]} ({len(rows)}) are not as they should be"
        )
    return True
