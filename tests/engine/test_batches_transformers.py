"""Rows of a batch under stacks of their own: each is what it would be alone."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from safetensors.torch import load_file, save_file

from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from app.backends.transformers import Backend
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import BatchRow, GenerateBatch, GeneratedBatch
from app.generation.hf_batch import Rows
from app.generation.hf_decode import Decoder
from tests import seeds
from tests.engine import tiny_models
from tests.engine.adapter_kit import FAMILIES, close, merged, random_adapter, random_model, tokens
from tests.engine.backend_kit import FakeReport, Said, ask, ask_surely, assistant, loaded, user
from tests.engine.test_live_stack import kinds


class RowReport(FakeReport):
    """Keeps rows apart."""

    def __init__(self, cancel_when: Any = lambda _: False) -> None:
        super().__init__(cancel_when)
        self.rows: dict[int, list[str]] = {}
        self.counts: dict[int, int] = {}

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        super().tokens(text, count, row)
        self.rows.setdefault(row, []).append(text)
        self.counts[row] = self.counts.get(row, 0) + count


def stack(*pairs: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_row_has_the_logits_of_its_merged_model(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed)
    settings = [kind for kind in kinds(family, model) if "target_parameters" not in kind]
    folders = [
        random_adapter(tmp_path / f"adapter{i}", family, model, seed + i, **kind) for i, kind in enumerate(settings)
    ]
    rng = random.Random(seed)
    stacks = [[], [(folders[0], 0.7)], [(folders[1], 1.0)]]
    stacks += [[(folder, rng.uniform(-1, 1.5)) for folder in rng.sample(folders, size)] for size in (2, 3, 7)]
    stacks += [[(folder, 0.6)] for folder in folders[2:]]
    ids = tokens(seed, rows=len(stacks))
    # Prompts of different lengths, one much shorter than a pass.
    lengths = [12, 3, 9, 12, 1, 7, *(rng.randrange(2, 13) for _ in stacks[6:])]
    exact = [merged(model, pairs) for pairs in stacks]
    last = (0, -1)
    live = LiveStack(model)
    for folder in folders:
        assert live.add(str(folder), open_adapter(folder)) == []
    base = Rows(Decoder(model, torch.device("cpu")), [ids[0].tolist()]).read(lambda *_: None, lambda: False)
    assert live.apply_rows([{str(folder): weight for folder, weight in pairs} for pairs in stacks]) == ""
    decoder = Decoder(model, torch.device("cpu"))
    decoder.chunk = 5 * len(stacks)  # several passes, the first of which is nothing but padding for short rows
    rows = Rows(decoder, [ids[row, : lengths[row]].tolist() for row in range(len(stacks))])
    answer = rows.read(lambda *_: None, lambda: False)
    for row, whole in enumerate(exact):
        assert close(answer[row], whole, ids[row : row + 1, : lengths[row]], last), (family, row, stacks[row])
    # One more token each, and then again when half of them have left.
    answer = rows.step([int(row) for row in ids[:, -1]])
    for row, whole in enumerate(exact):
        text = torch.cat([ids[row, : lengths[row]], ids[row, -1:]])[None]
        assert close(answer[row], whole, text, last), (family, row)
    left = sorted(rng.sample(range(len(stacks)), 4))
    rows.keep(left)
    assert live.apply_rows([{str(f): w for f, w in stacks[row]} for row in left]) == ""
    answer = rows.step([5] * 4)
    for place, row in enumerate(left):
        text = torch.cat([ids[row, : lengths[row]], ids[row, -1:], torch.tensor([5])])[None]
        assert close(answer[place], exact[row], text, last), (family, row)
    live.apply({})
    after = Rows(Decoder(model, torch.device("cpu")), [ids[0].tolist()]).read(lambda *_: None, lambda: False)
    assert torch.equal(base, after), "the base is the base again"
    live.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelEntry, list[Path]]:
    """A model folder and four adapters for it."""
    root = tmp_path_factory.mktemp("batch")
    chance = seeds.of(__name__)
    print("seed", chance)
    entry = tiny_models.make(root / "model", "llama", seed=chance)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    settings: list[dict[str, Any]] = [
        {"r": 8},
        {"r": 4, "use_dora": True},
        {"r": 2, "modules_to_save": ["lm_head"], "use_rslora": True},
        {"r": 3, "bias": "all"},
    ]
    return entry, [
        random_adapter(root / f"adapter {i}", "llama", model, chance + i, **kind) for i, kind in enumerate(settings)
    ]


def one_by_one(backend: Backend, rows: list[BatchRow], sampling: Sampling) -> list[Said]:
    """What each row says alone."""
    before, found = backend.stack, []
    for row in rows:
        backend.set_adapters(row.adapters, FakeReport())
        parameters = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
        parameters["seed"] = row.seed if row.seed is not None else sampling.seed
        found.append(ask_surely(backend, row.prompt if row.prompt is not None else row.messages, **parameters))
    backend.set_adapters(before, FakeReport())
    return found


def test_rows_say_what_they_say_alone(made: Any) -> None:
    entry, (first, second, third, fourth) = made
    talk = (user("What is your name?"), assistant("Weft."), user("And the warp?"))
    rows = [
        BatchRow(prompt="The warp is held"),
        BatchRow(prompt="The warp is held", adapters=stack((first, 0.7), (fourth, 1.0))),
        BatchRow(messages=talk, adapters=stack((second, 1.0))),
        BatchRow(prompt="Over and under, over and under. " * 9, adapters=stack((third, -0.5), (first, 1.2))),
        BatchRow(messages=talk, adapters=stack((fourth, 1.0))),
        BatchRow(prompt="The warp is held", seed=8),
        BatchRow(prompt="The warp is held", seed=9),
    ]
    samplings = [
        Sampling(temperature=0, max_tokens=20, seed=4),
        Sampling(temperature=1.2, max_tokens=30, seed=5, repetition_penalty=1.2, dry_multiplier=0.8),
        Sampling(temperature=0.9, max_tokens=25, seed=6, json_schema='{"type": "array", "items": {"type": "integer"}}'),
    ]
    with loaded(Backend(), entry) as (backend, _):
        backend.set_adapters(stack((first, 0.3)), FakeReport())
        chat = ask_surely(backend, talk)
        for sampling in samplings:
            expected = one_by_one(backend, rows, sampling)
            ask(backend, talk)
            report = RowReport()
            result = backend.generate_batch(GenerateBatch(rows=tuple(rows), sampling=sampling), report)
            assert result.note == ""
            for number, said in enumerate(expected):
                together, alone = result.rows[number], said.done
                assert said.same_as("".join(report.rows.get(number, []))), (number, sampling)
                assert (together.prompt_tokens, together.seed) == (alone.prompt_tokens, alone.seed)
                if said.whole:
                    assert (together.tokens, together.finish_reason) == (alone.tokens, alone.finish_reason)
                assert report.counts.get(number, 0) == together.tokens
            assert any(said.whole for said in expected)
            again = ask(backend, talk)
            assert chat.same_as(again[0]), "the stack is what it was"
            assert again[1].reused_tokens == again[1].prompt_tokens - 1, "and so is what was read under it"


def test_rows_stream_and_end_by_themselves(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, (first, second, *_) = made
    passes: list[int] = []
    step = Rows.step
    monkeypatch.setattr(Rows, "step", lambda self, tokens: (passes.append(len(tokens)), step(self, tokens))[1])
    with loaded(Backend(), entry) as (backend, _):
        # A random model may say the same twice: a piece that stops one row and that the other never says.
        for prompt in ("The warp", "A weft", "Blue", "One, two", "?", "Say it", "9 of 10", "Threads are"):
            rows = tuple(BatchRow(prompt=prompt, adapters=stack((path, 1.0))) for path in (first, second))
            alone = one_by_one(backend, list(rows), Sampling(temperature=0, max_tokens=40))
            texts = [said.text for said in alone]
            found = [
                (n, text[at : at + 3])
                for n, text in enumerate(texts)
                for at in range(6, len(text) // 2)
                if alone[0].whole and alone[1].whole and text[at : at + 3] not in texts[1 - n]
                if text.index(text[at : at + 3]) == at
                if text[at : at + 3].isprintable() and not set(text[at : at + 3]) & set("\\\ufffd ")
            ]
            if found:
                break
        ender, stop = found[0]
        report = RowReport()
        passes.clear()
        result = backend.generate_batch(
            GenerateBatch(rows=rows, sampling=Sampling(temperature=0, max_tokens=40, stop=stop)), report
        )
        assert result.rows[ender].finish_reason == "stop" and result.rows[1 - ender].finish_reason == "length"
        assert result.rows[ender].tokens < result.rows[1 - ender].tokens
        assert result.rows[ender].seconds <= result.rows[1 - ender].seconds
        assert "".join(report.rows[ender]) == texts[ender].split(stop)[0]
        assert passes == [2] * (result.rows[ender].tokens - 1) + [1] * (40 - result.rows[ender].tokens), "together"
        assert len(report.pieces) > 4, "piece by piece"


def test_a_batch_can_be_cancelled_at_any_time(made: Any) -> None:
    entry, (first, second, *_) = made
    rows = tuple(BatchRow(prompt="The warp " * 20, adapters=stack((path, 1.0))) for path in (first, second))
    with loaded(Backend(), entry) as (backend, _):
        base = ask_surely(backend, "The warp")
        for when in (lambda r: True, lambda r: bool(r.phases), lambda r: r.count > 8):
            report = RowReport(when)
            result = backend.generate_batch(
                GenerateBatch(rows=rows, sampling=Sampling(temperature=0, max_tokens=200)), report
            )
            assert isinstance(result, GeneratedBatch)
            assert [row.finish_reason for row in result.rows] == ["cancelled", "cancelled"]
            assert all(row.tokens < 30 for row in result.rows)
            assert base.same_as(ask(backend, "The warp")[0])


def test_a_bad_row_fails_the_batch_and_changes_nothing(made: Any, tmp_path: Path) -> None:
    entry, (first, *_) = made
    with loaded(Backend(), entry) as (backend, _):
        backend.set_adapters(stack((first, 1.0)), FakeReport())
        before = ask_surely(backend, "The warp")
        for bad in (BatchRow(prompt="x", adapters=stack((tmp_path / "none", 1.0))), BatchRow(prompt="x", adapters=stack((first, float("nan"))))):  # fmt: skip
            report = RowReport()
            with pytest.raises(WeftError):
                backend.generate_batch(GenerateBatch(rows=(BatchRow(prompt="x"), bad)), report)
            assert not report.count
            assert before.same_as(ask(backend, "The warp")[0])


def test_rows_that_do_not_fit_together_go_one_after_the_other(
    made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, (first, *_) = made
    rows = [BatchRow(prompt="The warp"), BatchRow(prompt="The warp", adapters=stack((first, 1.0)))]
    greedy = Sampling(temperature=0, max_tokens=10, seed=1)
    with loaded(Backend(), entry) as (backend, _):
        expected = one_by_one(backend, rows, greedy)
        monkeypatch.setattr("app.backends.transformers._free", lambda _: 20_000)
        report = RowReport()
        result = backend.generate_batch(GenerateBatch(rows=tuple(rows), sampling=greedy), report)
        assert "GB are free" in result.note
        assert all(said.same_as("".join(report.rows[number])) for number, said in enumerate(expected))
        for what in ("repeats", "broken"):
            bad = tmp_path / what
            shutil.copytree(first, bad)
            if what == "repeats":
                settings = json.loads((bad / "adapter_config.json").read_text()) | {
                    "layer_replication": [[0, 2], [0, 2]]
                }
                (bad / "adapter_config.json").write_text(json.dumps(settings))
            tensors = load_file(bad / "adapter_model.safetensors")
            next(iter(tensors.values())).fill_(float("nan"))
            save_file(tensors, bad / "adapter_model.safetensors")
            report, wrong = RowReport(), (*rows, BatchRow(prompt="x", adapters=stack((bad, 1.0))))
            with pytest.raises(WeftError, match="no numbers"):
                backend.generate_batch(GenerateBatch(rows=wrong, sampling=greedy), report)
            assert not any(report.rows.values()), "no row has said a word"


def test_experts_and_states_go_one_after_the_other_and_say_so(tmp_path: Path, seed: int) -> None:
    entry = tiny_models.make(tmp_path / "model", "mixtral", seed=seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    folder = random_adapter(
        tmp_path / "experts", "mixtral", model, seed, r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )  # fmt: skip
    rows = [BatchRow(prompt="The warp"), BatchRow(prompt="The weft", adapters=stack((folder, 1.0)))]
    greedy = Sampling(temperature=0, max_tokens=12)
    with loaded(Backend(), entry) as (backend, _):
        expected = one_by_one(backend, rows, greedy)
        report = RowReport()
        result = backend.generate_batch(GenerateBatch(rows=tuple(rows), sampling=greedy), report)
        assert "Experts take one stack at a time" in result.note
        assert all(said.same_as("".join(report.rows[number])) for number, said in enumerate(expected))
        assert expected[0].text != expected[1].text
        same = tuple(BatchRow(prompt=text, adapters=rows[1].adapters) for text in ("The warp", "The weft"))
        result = backend.generate_batch(GenerateBatch(rows=same, sampling=greedy), RowReport())
        assert result.note == "", "one stack for all rows is no trouble"
    entry = tiny_models.make(tmp_path / "recurrent", "mamba", seed=seed)
    with loaded(Backend(), entry) as (backend, _):
        result = backend.generate_batch(GenerateBatch(rows=(BatchRow(prompt="a"), BatchRow(prompt="b")), sampling=greedy), RowReport())  # fmt: skip
        assert "state" in result.note and len(result.rows) == 2
