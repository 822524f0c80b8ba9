"""ChatTemplate: a conversation as the text that a model was trained to see, rendered where it can do no harm."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.generation.renderer import TEMPLATE_HINT, Renderer, TemplateRefusal, remaining

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, for models that bring no template of their own."""

LARGEST_SOURCE = 1024 * 1024  # characters; real templates stay under 50,000
SYSTEM_MOVED = "This model's chat template takes no system prompt; it was put at the head of the first message."
ROLES_JOINED = "This model's chat template wants user and assistant to take turns; neighbouring messages were joined."


class ChatTemplate:
    """Renders conversations through one Jinja template, in a child process that is kept alive between calls.

    The child starts with the first `render`, or sooner with `warm` (while a model loads, so that it costs the
    first answer nothing). Not to be used by two threads at once; `close` ends the child.

    Args:
        source: the template.
        bos_token, eos_token: what the template sees under these names.
        variables: further names that it sees (`enable_thinking`, …).

    Attributes:
        note: what the last `render` had to change to please the template, in a sentence; "" when nothing.

    Raises:
        WeftError: HOSTILE when the source is absurdly long.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", **variables: Any) -> None:
        if len(source) > LARGEST_SOURCE:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The model's chat template has {len(source):,} characters; that is none.",
                TEMPLATE_HINT,
            )
        self.source = source
        self.note = ""
        self._variables = {
            "tools": None,
            "documents": None,
            **variables,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        self._renderer = Renderer(source)

    def warm(self) -> None:
        """Start the child and have it compile the template, without waiting for either."""
        self._renderer.start()

    def wait_until_ready(self) -> None:
        """Wait for what `warm` began, so that the first answer does not pay for it."""
        self._renderer.wait_until_ready()

    def set_variables(self, **variables: Any) -> None:
        """Add or change names that the template sees."""
        self._variables.update(variables)

    def close(self) -> None:
        """End the child. The next `render` starts another."""
        self._renderer.close()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, messages: Sequence[Message], *, continue_last: bool = False, deadline: float = 2.0) -> str:
        """The conversation as text, ending where the assistant is to write.

        A template that refuses or drops a system prompt, or wants the roles to alternate, gets a conversation
        that it can take: the system prompt at the head of the first user message, neighbours of one role joined.

        Args:
            continue_last: end right after the content of the last message (the assistant's) instead of
                opening a new answer.
            deadline: seconds after which the child is killed.

        Raises:
            WeftError: BAD_INPUT when the template refuses the conversation, CORRUPT when it is no template,
                HOSTILE when it attacks or does not end. The next call works again.
        """
        self.note = ""
        if not messages:
            raise WeftError(ErrorKind.BAD_INPUT, "There is no message to answer.", "Write a message first.")
        ends = time.monotonic() + deadline
        refusal: TemplateRefusal | None = None
        as_it_is: str | None = None
        for form, note in _forms(messages):
            try:
                text = self._render(form, continue_last, ends)
            except TemplateRefusal as error:
                refusal = refusal or error
                continue
            if all(m.content.strip() in text for m in messages if m.role == "system"):
                self.note = note
                return text
            as_it_is = as_it_is or text
        if as_it_is is not None:  # it rewrites the system prompt in every form; that is its right
            return as_it_is
        assert refusal is not None
        raise refusal

    def _render(self, messages: Sequence[Message], continue_last: bool, ends: float) -> str:
        shown = [{"role": m.role, "content": m.content} for m in messages]
        # The mark finds the end of the last message again; whether its blank survives tells if the template trims.
        mark = f"CONTINUE-{secrets.token_hex(8)}"
        if continue_last:
            shown[-1]["content"] += mark + " "
        variables = {**self._variables, "add_generation_prompt": not continue_last}
        text = self._renderer.render(shown, variables, remaining(ends))
        if not continue_last:
            return text
        at = text.rfind(mark)
        if at < 0 or messages[-1].content.strip() not in text:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "This model's chat template rewrites the last message, so that it cannot be continued.",
                "Regenerate the answer instead.",
            )
        blank_kept = text.startswith(mark + " ", at)
        return text[:at] if blank_kept else text[:at].rstrip()


def _forms(messages: Sequence[Message]) -> Iterator[tuple[list[Message], str]]:
    """The conversation as it is, then forms that stricter templates take, each with what was changed."""
    original = list(messages)
    moved, joined = _move_system(original), _join_neighbours(original)
    both = _join_neighbours(moved)
    seen: list[list[Message]] = []
    for form, note in (
        (original, ""),
        (moved, SYSTEM_MOVED),
        (joined, ROLES_JOINED),
        (both, f"{SYSTEM_MOVED} {ROLES_JOINED}" if moved != original else ROLES_JOINED),
    ):
        if form not in seen:
            seen.append(form)
            yield form, note


def _move_system(messages: list[Message]) -> list[Message]:
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    if not system.strip():
        return rest or messages
    for at, message in enumerate(rest):
        if message.role == "user":
            rest[at] = Message(role="user", content=f"{system}\n\n{message.content}")
            return rest
    return [Message(role="user", content=system), *rest]


def _join_neighbours(messages: list[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = Message(role=message.role, content=f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return joined
