"""Chat templates: rendered as transformers does, in a process that attacks cannot leave or exhaust."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.generation.template import DEFAULT_TEMPLATE, ROLES_JOINED, SYSTEM_MOVED, ChatTemplate

pytest.importorskip("jinja2", reason="jinja2 is not installed in this interpreter")

CHAT = [
    Message(role="system", content="Be <brief>."),
    Message(role="user", content="Hi {{ 1 + 1 }}"),
    Message(role="assistant", content="Hello"),
    Message(role="user", content="How?"),
]
STRICT = (  # as Mistral's and Gemma's templates do
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    mine = [p.cmdline() for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in mine if c and c[-1].endswith("render_host.py")]


def render(source: str, messages: list[Message] = CHAT, **options: object) -> str:
    with ChatTemplate(source, "<s>", "</s>") as template:
        return template.render(messages, **options)  # type: ignore[arg-type]


def test_chatml() -> None:
    text = render(DEFAULT_TEMPLATE)
    assert text.startswith("<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\nHi {{ 1 + 1 }}<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\n")


def test_everything_that_templates_use() -> None:
    source = """{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {% generation %}<{{ m.content | tojson }}>{% endgeneration %}
    {% if ns.n == 2 %}{% break %}{% endif %}
{%- endfor -%}
{{ strftime_now('%Y') | length }}{{ eos_token }}{{ dict(a=1).a }}{{ tools is none }}{{ messages[0].content }}"""
    assert render(source) == '<"Hi {{ 1 + 1 }}"><"Hello">4</s>1TrueBe <brief>.'


def test_continue_ends_right_after_the_answer() -> None:
    chat = [*CHAT[:2], Message(role="assistant", content="Hello, I  ")]
    assert render(DEFAULT_TEMPLATE, chat, continue_last=True).endswith("<|im_start|>assistant\nHello, I  ")
    assert render(STRICT, chat, continue_last=True).endswith("[assistant]Hello, I")
    empty = [*CHAT[:2], Message(role="assistant", content="")]
    assert render(DEFAULT_TEMPLATE, empty, continue_last=True).endswith("<|im_start|>assistant\n")


def test_a_template_that_drops_the_answer_cannot_continue() -> None:
    with pytest.raises(WeftError, match="cannot be continued") as error:
        render("{{ messages[0].content }}", [*CHAT[:2], Message(role="assistant", content="x")], continue_last=True)
    assert error.value.kind is ErrorKind.BAD_INPUT


def test_a_refused_system_prompt_goes_into_the_first_message() -> None:
    with ChatTemplate(STRICT, "<s>") as template:
        assert template.render(CHAT) == "<s>[user]Be <brief>.\n\nHi {{ 1 + 1 }}[assistant]Hello[user]How?"
        assert template.note == SYSTEM_MOVED
        assert template.render(CHAT[1:]) == "<s>[user]Hi {{ 1 + 1 }}[assistant]Hello[user]How?"
        assert template.note == ""


def test_a_silently_dropped_system_prompt_goes_there_too() -> None:
    source = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert render(source).startswith("[user]Be <brief>.\n\nHi")


def test_roles_that_must_alternate_are_joined() -> None:
    chat = [CHAT[1], Message(role="user", content="again"), CHAT[2], CHAT[3]]
    with ChatTemplate(STRICT) as template:
        assert template.render(chat) == "[user]Hi {{ 1 + 1 }}\n\nagain[assistant]Hello[user]How?"
        assert template.note == ROLES_JOINED
        assert template.render([CHAT[0], *chat]).startswith("[user]Be <brief>.\n\nHi {{ 1 + 1 }}\n\nagain[assistant]")


def test_a_refusal_is_told_in_the_templates_words() -> None:
    with pytest.raises(WeftError, match="never mind") as error:
        render("{{ raise_exception('never mind') }}")
    assert error.value.kind is ErrorKind.BAD_INPUT and "chat_template" in error.value.hint


def test_a_damaged_template_is_told_each_time() -> None:
    with ChatTemplate("{% for %}") as template:
        for _ in range(2):
            with pytest.raises(WeftError, match="damaged: line 1") as error:
                template.render(CHAT)
            assert error.value.kind is ErrorKind.CORRUPT


def test_a_template_longer_than_a_pipe_holds() -> None:
    assert render("{# " + "x" * 200_000 + " #}" + DEFAULT_TEMPLATE).endswith("assistant\n")


def test_a_long_conversation() -> None:
    chat = [Message(role="user", content="wörd " * 400_000)]
    assert len(render(DEFAULT_TEMPLATE, chat, deadline=20.0)) > 2_000_000


def test_no_message_is_refused() -> None:
    with pytest.raises(WeftError, match="no message"):
        render(DEFAULT_TEMPLATE, [])


def test_the_child_is_kept_and_rendering_is_quick() -> None:
    with ChatTemplate(DEFAULT_TEMPLATE) as template:
        template.warm()
        template.render(CHAT, deadline=10)
        times: list[float] = []
        for _ in range(30):
            start = time.perf_counter()
            template.render(CHAT, deadline=10)
            times.append(time.perf_counter() - start)
        assert sorted(times)[len(times) // 4] < 0.015  # the whole budget that a first token may gain


ATTACKS = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch ' ~ bos_token) }}",
    "attr filter": "{{ (''|attr('__class__')|attr('__base__')|attr('__subclasses__'))() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) ~ messages.__class__.__bases__[0]() }}",
    "format_map": "{{ ('{a.__class__}'.format_map({'a': 1}) ~ cycler.__init__.__globals__.os.system('id')) }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('id') }}",
    "namespace": "{% set n = namespace(__class__=dict) %}{{ n }}",
    "namespace item": "{% set n = namespace() %}{% set n.__init__ = 1 %}{{ n }}",
    "change": "{{ messages.append(1) }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "wide range": "{{ range(10**9) | list }}",
    "repeat": "{{ 'x' * 10**10 }}",
    "repeat list": "{{ ([0] * 10**6) * 10**6 }}",
    "product": "{% set n = namespace(x=9) %}{% for i in range(9999) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "double": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "add": "{% set n = namespace(x=['x']) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "width": "{{ '{:9999999999}'.format(1) }}",
    "power": "{{ 9**9**9**9 }}",
    "shift": "{{ 2 ** (2 ** 40) }}",
    "indent": "{{ ('x\\n' * 10**6) | indent(10**6) }}",
    "json": "{{ messages | tojson(indent=10**10) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep source": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 2_000 + "x" + "{% endif %}" * 2_000,
    "deep list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "backtracking": "{{ ('a' * 50000 ~ '!') | urlize | wordwrap(1) | striptags }}" * 30,
}


def held() -> int:
    """Bytes of this process and its children: what others on the machine take is not the attack's doing."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += process.memory_info().rss
    return total


@pytest.mark.attack
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_ends_in_time_and_rendering_goes_on(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    before = held()
    with ChatTemplate(ATTACKS[name], bos_token=str(mark)) as template:
        template.warm()
        start = time.monotonic()
        try:
            text = template.render(CHAT, deadline=1.5)
        except WeftError as error:
            assert error.kind in (ErrorKind.HOSTILE, ErrorKind.BAD_INPUT, ErrorKind.CORRUPT)
            assert error.hint
        else:  # harmless: it came to an end within its bounds and shows nothing of the process
            assert "<class" not in text and "uid=" not in text and len(text) <= 16 * 1024 * 1024
        # The child's start is ours, not the attack's: on a busy machine it may take a second by itself.
        assert time.monotonic() - start < 15
        assert held() - before < 2**31
    assert not mark.exists()
    assert render(DEFAULT_TEMPLATE, deadline=10).endswith("assistant\n")


@pytest.mark.attack
def test_a_message_is_data_not_a_template() -> None:
    chat = [Message(role="user", content="{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__ }}")]
    assert chat[0].content in render(DEFAULT_TEMPLATE, chat)


@pytest.mark.attack
def test_a_template_of_absurd_length_is_refused() -> None:
    with pytest.raises(WeftError, match="characters"):
        ChatTemplate("x" * 2_000_000)


@pytest.mark.fault
def test_a_killed_renderer_is_started_again() -> None:
    with ChatTemplate(DEFAULT_TEMPLATE) as template:
        first = template.render(CHAT, deadline=10)
        child = next(p for p in psutil.Process(os.getpid()).children() if p.cmdline()[-1].endswith("render_host.py"))
        child.kill()
        child.wait()
        assert template.render(CHAT, deadline=10) == first
