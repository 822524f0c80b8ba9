"""What a certificate says in words is the same on the command line, in the model's card, in JSON and in the window."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from app.cli_certify import certified_json, print_certificate
from app.core.certify_plan import SAME_KL, SMALL_KL, Certificate, section, verdict

FOUND = Certificate(
    a="base with x 0.5",
    b="made",
    text="text.txt",
    text_sha256="0" * 64,
    predictions=1234,
    largest_logit_difference=0.5,
    mean_kl=0.0,
    largest_kl=0.5,
    top1_agreement=0.9,
    perplexity_a=3.0,
    perplexity_b=3.1,
    window=512,
)


@pytest.mark.parametrize(
    ("kl", "says"),
    [
        (0.0, "Practically the same"),
        (math.nextafter(SAME_KL, 0), "Practically the same"),
        (SAME_KL, "A small difference"),
        (SMALL_KL, "It differs clearly"),
        (math.nan, "It differs clearly"),
    ],
)
def test_the_same_words_everywhere(kl: float, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = msgspec.structs.replace(FOUND, mean_kl=kl)
    words = verdict(found)
    assert words.startswith(says)
    print_certificate(found)
    assert words in capsys.readouterr().out.splitlines()
    assert f"\n- {words}\n" in section(found)
    assert json.loads(certified_json(found, found))["certificate"]["verdict"] == words
    assert "verdict" not in json.loads(msgspec.json.encode(found)), "what is stored are the figures"
