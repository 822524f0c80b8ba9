"""Renders chat templates in a small process of its own, since a template from the internet is a program.

Started by `app.generation.template` as a plain file (`python -I render_host.py`): it imports the standard
library and jinja2 only. One JSON object a line each way:

    {"source": "…", "messages": […], "variables": {…}, "cpu": 3}  ->  {"text": "…"} or {"error": "…", "kind": "…"}

`source` is left out when it is the one sent last; without `messages` the template is only compiled. Kinds:
`syntax`, `raised` (the template itself refuses the conversation), `security`, `memory`, `failed`.

    {"many": [{"messages": […], "variables": {…}}, …], "cpu": 3}  ->  {"many": [one answer as above for each]}

Of many, those after the first LARGEST characters of text are left out (kind `skipped`).

The template's surroundings are those that transformers gives it (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, the `generation` tag), in jinja2's immutable
sandbox. Address space and CPU time are limited, files cannot grow, and repetition is bounded before it allocates.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY = 256 * 1024 * 1024  # bytes of address space
LARGEST = 16 * 1024 * 1024  # characters of a rendered conversation, or items made by one repetition


class Raised(jinja2.TemplateError):
    """The template called raise_exception."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote.

    For rendering it is transparent, unless the variables weft_generation_open and weft_generation_close are set: they
    are written around it then, so that training finds the answers.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [
            jinja2.nodes.Output([jinja2.nodes.Name(f"weft_generation_{side}", "load")], lineno=line)
            for side in ("open", "close")
        ]
        return [marks[0], *body, marks[1]]


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a bound on what one multiplication or power can make."""

    # An intercepted operator is not folded while compiling either, so `{{ 'x' * 10**10 }}` is harmless there too.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(a, (str, bytes, list, tuple)) and isinstance(b, int) and len(a) * b > LARGEST:
                    raise MemoryError
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 65536:
                raise MemoryError
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 65536:
            raise MemoryError
        return super().call_binop(context, operator, left, right)


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # the template may want a field called `self`
        fields = dict(*args[1:], **kwargs)
        for name in fields:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], fields)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template must not set {name!r}")


class DictMaker:
    """`dict(...)` in a template, without the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def raise_exception(message: Any) -> None:
    raise Raised(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> Sandbox:
    """The surroundings of a template."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=DictMaker(), namespace=Namespace
    )
    return env


def limit() -> None:
    """Bound what a template that got out could do. Windows has no such limits; there the deadline alone holds."""
    try:
        import resource
    except ImportError:
        return
    for name, value in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0)):
        try:
            which = getattr(resource, name)
            _, hard = resource.getrlimit(which)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # this system does not know or does not allow that limit; the others still hold


def limit_cpu(seconds: float) -> None:
    """Allow this many more seconds of CPU time: an endless loop ends even when nobody is left to kill it."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds + 1), hard))
    except (ImportError, ValueError, OSError):
        return  # no such limit here; the parent's deadline holds


class Host:
    """Keeps the template compiled last."""

    def __init__(self) -> None:
        self.environment = environment()
        self.template: jinja2.Template | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compile and render as asked; every failure becomes an answer."""
        limit_cpu(request.get("cpu", 3))
        if "many" not in request:
            return self.answer_one(request)
        answers: list[dict[str, str]] = []
        size = 0
        for each in request["many"]:
            late = size > LARGEST
            answers.append({"error": "too much at once", "kind": "skipped"} if late else self.answer_one(each))
            size += len(answers[-1].get("text", ""))
        return {"many": answers}

    def answer_one(self, request: dict[str, Any]) -> dict[str, str]:
        """One conversation, or the template to compile."""
        try:
            if "source" in request:
                self.template = None
                self.template = self.environment.from_string(request["source"])
            if "messages" not in request:
                return {"text": ""}
            if self.template is None:
                return {"error": "no template was sent", "kind": "failed"}
            return {"text": self.render(request["messages"], request.get("variables", {}))}
        except Raised as error:
            return {"error": str(error.message), "kind": "raised"}
        except jinja2.TemplateSyntaxError as error:
            return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
        except jinja2.exceptions.SecurityError as error:
            return {"error": str(error), "kind": "security"}
        except (MemoryError, OverflowError):
            return {"error": "it asks for too much memory", "kind": "memory"}
        except RecursionError:
            return {"error": "it calls itself without end", "kind": "memory"}
        except Exception as error:  # noqa: BLE001 (a template can raise anything; all of it is its own failure)
            return {"error": f"{type(error).__name__}: {error}"[:2000], "kind": "failed"}

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The text, refused as soon as it grows beyond LARGEST characters."""
        assert self.template is not None
        parts: list[str] = []
        size = 0
        for part in self.template.generate(messages=messages, **variables):
            size += len(part)
            if size > LARGEST:
                raise MemoryError
            parts.append(part)
        return "".join(parts)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the engine's to handle
    # The pipe is taken away from fd 1: nothing that a template reaches can write into the protocol.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limit()
    host = Host()
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        answer = host.answer(json.loads(line))
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
