"""pip's configuration, handed on to uv."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.environment_install import torch_backend
from app.engine.package_sources import Sources, cached_wheels, local_wheels, parse_pip_config, translate

LISTING = """\
:env:.find-links='/wheels /more'
global.cert='/etc/ca.crt'
global.extra-index-url='https://one/simple\\nhttps://two/simple'
global.find-links='/elsewhere'
global.index-url='https://mirror/simple'
install.timeout='60'
freeze.all='true'
"""


def test_pips_configuration_reaches_uv() -> None:
    sources = translate(parse_pip_config(LISTING), {})
    assert sources.variables == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/etc/ca.crt",
        "UV_HTTP_TIMEOUT": "60",
    }
    assert sources.find_links == ("/wheels", "/more")
    assert sources.configured


def test_the_environment_goes_before_the_files() -> None:
    assert parse_pip_config(LISTING)["find-links"] == "/wheels /more"


@pytest.mark.parametrize(
    ("own", "untouched"),
    [
        ("UV_DEFAULT_INDEX", "UV_DEFAULT_INDEX"),
        ("UV_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("UV_INDEX", "UV_INDEX"),
        ("UV_EXTRA_INDEX_URL", "UV_INDEX"),
        ("UV_FIND_LINKS", "UV_FIND_LINKS"),
        ("SSL_CERT_FILE", "SSL_CERT_FILE"),
        ("UV_INDEX_STRATEGY", "UV_INDEX_STRATEGY"),
    ],
)
def test_uvs_own_variables_win(own: str, untouched: str) -> None:
    assert untouched not in translate(parse_pip_config(LISTING), {own: "mine"}).variables


def test_no_configuration_hands_nothing_on() -> None:
    sources = translate({}, {})
    assert sources.variables == {}
    assert not sources.configured


@given(st.text())
def test_no_listing_breaks_it(listing: str) -> None:
    translate(parse_pip_config(listing), {})


def test_the_build_of_torch_is_ours_to_choose_only_where_nothing_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "app.engine.environment_install"
    monkeypatch.setattr(f"{module}.sys.platform", "linux")
    monkeypatch.setattr(f"{module}.has_nvidia", lambda: False)
    assert torch_backend(Sources(variables={})) == ["--torch-backend=cpu"]
    monkeypatch.setattr(f"{module}.has_nvidia", lambda: True)
    assert torch_backend(Sources(variables={})) == ["--torch-backend=auto"]
    assert torch_backend(Sources(variables={}, configured=True)) == []
    monkeypatch.setattr(f"{module}.sys.platform", "darwin")
    assert torch_backend(Sources(variables={})) == []


def test_wheels_that_lie_here_are_found(tmp_path: Path) -> None:
    built = tmp_path / "wheels" / "a" / "b" / "c" / "d"
    built.mkdir(parents=True)
    (built / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl").touch()
    assert cached_wheels("llama-cpp-python", "0.3.36", tmp_path) == (built,)
    assert cached_wheels("llama-cpp-python", "0.3.3", tmp_path) == ()
    assert cached_wheels("llama-cpp-python", "0.3.36", None) == ()
    assert len(local_wheels("llama-cpp-python", "0.3.36", ("https://x/y", str(built), f"file://{built}"))) == 2
