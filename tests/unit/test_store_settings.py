"""Settings: a file that people edit, programs write at once, and disks refuse."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import ErrorKind, WeftError
from app.store.settings import Settings, SettingsStore
from app.store.toml_text import dump


def test_no_file_means_defaults(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path / "config" / "settings.toml")
    assert store.settings == Settings() and store.problems == ()
    assert not (tmp_path / "config").exists()  # nothing is made until somebody saves


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "config" / "settings.toml"
    saved = SettingsStore(path).update(
        appearance="dark",
        roots=("/models", 'C:\\"quoted"\nname'),
        sampling_presets={"Warm & wild": {"temperature": 1.5, "top_k": 0, "stop": "\n\\n", "seed": None}},
        calibration={"threads": 4, "omp_wait_policy": "passive"},
        proxy="http://127.0.0.1:3128",
    )
    again = SettingsStore(path)
    assert again.problems == ()
    assert again.settings.roots == saved.roots and again.settings.appearance == "dark"
    assert again.settings.sampling_presets == {"Warm & wild": {"temperature": 1.5, "top_k": 0, "stop": "\n\\n"}}
    assert again.settings.calibration == saved.calibration
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0  # a proxy address may hold a password
    assert [p.name for p in path.parent.iterdir()] == ["settings.toml"]


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path / "settings.toml")
    store.update(autoload=False)
    assert tomllib.loads(store.path.read_text()) == {"autoload": False}
    store.update(autoload=True)
    assert tomllib.loads(store.path.read_text()) == {}


def test_unknown_keys_and_wrong_values_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('appearance = "blue"\nroots = ["/a"]\nfrom_the_future = 5\n[later]\nx = [1, 2]\n')
    store = SettingsStore(path)
    assert store.settings == Settings(roots=("/a",))
    assert len(store.problems) == 1 and "appearance" in store.problems[0] and "blue" in store.problems[0]
    store.update(autoload=False)
    table = tomllib.loads(path.read_text())
    assert table["from_the_future"] == 5 and table["later"] == {"x": [1, 2]} and table["appearance"] == "blue"
    store.update(appearance="light")
    assert tomllib.loads(path.read_text())["appearance"] == "light"
    assert SettingsStore(path).problems == ()


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"appearance = ", b"\xff\xfe\x00", b"a = " + b"[" * 5000, b"x = 1\n" * 900_000])
def test_a_broken_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    store = SettingsStore(path)
    assert store.settings == Settings()
    assert len(store.problems) == 1 and "defaults are used" in store.problems[0]
    (aside,) = tmp_path.glob("settings.toml.broken-*")
    assert aside.read_bytes() == content and aside.name in store.problems[0]
    store.update(appearance="dark")
    assert SettingsStore(path).problems == ()


def test_wrong_changes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path / "settings.toml")
    for change in ({"appearance": "blue"}, {"apearance": "dark"}, {"roots": 5}):
        with pytest.raises(WeftError) as caught:
            store.update(**change)
        assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint
    assert store.settings == Settings() and not store.path.exists()


@pytest.mark.attack
def test_a_hub_token_never_gets_in(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    token = "hf_" + "aB3" * 11
    store = SettingsStore(path)
    with pytest.raises(WeftError, match="token"):
        store.update(hub_endpoint=f"https://user:{token}@hub")
    path.write_text(f'hub_token = "{token}"\nautoload = false\n[deep]\nkey = ["{token}"]\n')
    store = SettingsStore(path)
    assert len(store.problems) == 2 and not any(token in problem for problem in store.problems)
    store.update(appearance="dark")
    assert token not in path.read_text() and not store.settings.autoload


@pytest.mark.fault
def test_a_disk_that_refuses_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SettingsStore(tmp_path / "settings.toml")
    store.update(appearance="dark")
    before = store.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WeftError) as caught:
            store.update(appearance="light")
    assert caught.value.kind is ErrorKind.DISK_FULL
    assert store.path.read_bytes() == before and store.settings.appearance == "dark"
    assert [p.name for p in tmp_path.iterdir()] == ["settings.toml"]
    assert store.update(appearance="light").appearance == "light"


def test_another_process_and_a_person_are_not_overwritten(tmp_path: Path) -> None:
    one, two = SettingsStore(tmp_path / "s.toml"), SettingsStore(tmp_path / "s.toml")
    one.update(appearance="dark")
    two.update(autoload=False)
    assert SettingsStore(tmp_path / "s.toml").settings == Settings(appearance="dark", autoload=False)


_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
_KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_toml_comes_back_as_it_was(table: dict[str, object]) -> None:
    assert tomllib.loads(dump(table)) == table
