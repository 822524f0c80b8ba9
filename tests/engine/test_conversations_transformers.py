"""Any sequence of changes during a conversation, with what was read kept where it may be: always the merged model's answers."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
pytest.importorskip("peft", reason="peft, which makes the adapters, is not installed in this interpreter")

from app.adapters.hf_stack import ModelStack
from app.generation.hf_batch import Rows
from app.generation.hf_decode import Decoder
from tests.engine.adapter_kit import VOCABULARY, close, logits, merged
from tests.engine.conversation_kit import Said, Stacking, chosen, conversations, made_once
from tests.engine.test_live_stack import make

ACTIONS = ("add", "remove", "reweight", "off", "order", "bake", "batch", "nothing")
GREEDY = 3  # tokens of an answer
_MADE: dict[str, tuple[Any, Any, list[Path]]] = {}


def _quiet(*_: object) -> None:
    return


@conversations(ACTIONS, examples=6)
def test_a_conversation_with_any_switches_is_the_merged_models(
    tmp_path_factory: pytest.TempPathFactory, family: str, said: Said
) -> None:
    _converse(tmp_path_factory, family, said)


@pytest.mark.slow
@conversations(ACTIONS, examples=40, most=10, shrink=True)
def test_long_conversations_with_any_switches_are_the_merged_models(
    tmp_path_factory: pytest.TempPathFactory, family: str, said: Said
) -> None:
    _converse(tmp_path_factory, family, said)


def _converse(tmp_path_factory: pytest.TempPathFactory, family: str, said: Said) -> None:
    """Add, remove, reweight, switch off, reorder, bake, answer batches, in any order: always the definition, to 1e-4."""

    def made(seed: int) -> tuple[Any, Any, list[Path]]:
        model, folders = make(tmp_path_factory.mktemp(family), family, seed)
        return model, copy.deepcopy(model), folders

    model, plain, folders = made_once(_MADE, family, made)
    decoder, stack, stacking = Decoder(model, torch.device("cpu")), ModelStack(model), Stacking(folders, said.first)
    words = torch.Generator().manual_seed(said.chance)
    conversation: list[int] = []
    baked = False
    stack.set(stacking.stack, _quiet)
    try:
        for action, number, weight, count in said.steps:
            stacking.act(action, number, weight)
            baked = action == "bake"
            stale, notes = stack.set(stacking.stack, _quiet, baked=baked)
            assert not notes and stack.baked <= baked
            if stale:
                decoder.reset()
            if action == "batch":
                _batch(plain, decoder, stack, stacking, conversation or [5])
            reference = merged(plain, stacking.pairs)
            conversation += torch.randint(2, VOCABULARY, (count,), generator=words).tolist()
            kept = decoder.begin(conversation)
            assert stale is False or kept == 0
            found = decoder.read(conversation, _quiet, lambda: False)
            for _ in range(GREEDY):
                expected = logits(reference, torch.tensor([conversation]))[0, -1]
                assert close(found, reference, torch.tensor([conversation]), (0, -1)), (family, action, stacking.pairs)
                token = int(found.argmax())
                assert chosen(expected, token), "what a run without any cache would say"
                conversation.append(token)
                found = decoder.step(token)
    finally:
        stack.close()
        decoder.close()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def _batch(plain: Any, decoder: Decoder, stack: ModelStack, stacking: Stacking, prompt: list[int]) -> None:
    """Rows under other stacks in the middle of a conversation: each is its merged model, and none leaves a trace."""
    others = [Stacking([], 0), stacking, Stacking(stacking.folders[2:4], 2)]
    with stack.rows([other.stack for other in others], _quiet) as rows:
        if rows.reason:
            assert "Experts" in rows.reason
            return
        found = Rows(decoder, [prompt] * 3).read(_quiet, lambda: False)
        assert found is not None
        for logits_, other in zip(found, others, strict=True):
            assert close(logits_, merged(plain, other.pairs), torch.tensor([prompt]), (0, -1)), other.pairs
