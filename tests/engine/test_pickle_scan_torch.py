"""The scan against torch itself: what torch saves passes, what torch refuses is refused, no global is allowed that torch is not."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.pickle_scan import ALLOWED, check
from app.core.recognise import recognise_adapter

torch = pytest.importorskip("torch")

# torch's dtypes have second names, and pickles of Python 2 name builtins otherwise; both mean what torch allows.
_ALIASES = {"double", "float", "half", "short", "int", "long", "chalf", "cfloat", "cdouble"}


def test_nothing_is_allowed_that_torch_does_not_allow() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    ours = {
        name for name in ALLOWED if not name.startswith("__builtin__.") and name.removeprefix("torch.") not in _ALIASES
    }
    assert ours <= set(_get_allowed_globals())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int64", "bool", "uint8"])
def test_what_torch_saves_passes(tmp_path: Path, zipped: bool, dtype: str) -> None:
    tensor = torch.zeros(3, 4).to(getattr(torch, dtype))
    state = collections.OrderedDict(
        a=tensor,
        b=tensor.t(),
        c=tensor[1:],
        n=5,
        x=2.5,
        big=2**70,
        s="text",
        nothing=None,
        deep={"list": [tensor, (1, 2)]},
    )
    if dtype.startswith(("float", "bfloat")):
        state["p"] = torch.nn.Parameter(tensor)
    path = tmp_path / "model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    check(path)
    assert torch.load(path, weights_only=True)["n"] == 5


@pytest.mark.attack
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_refuses_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.bin"
    for value in (torch.nn.Linear(2, 2), Path("x"), collections.deque([1]), print):
        torch.save({"x": value}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeftError) as caught:
            check(path)
        assert caught.value.kind is ErrorKind.HOSTILE


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lone_adapter_that_torch_saved_is_recognised(tmp_path: Path, zipped: bool) -> None:
    names = [
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight" for n in range(3) for side in "AB"
    ]
    torch.save(
        {name: torch.zeros(4, 4) for name in names}, tmp_path / "mine.bin", _use_new_zipfile_serialization=zipped
    )
    entry = recognise_adapter(tmp_path / "mine.bin")
    assert entry is not None and entry.targets == ("q_proj",)
