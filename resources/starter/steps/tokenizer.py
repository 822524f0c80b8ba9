"""The tokenizer: a SentencePiece BPE model as Llama's (but without a space put in front), and its `tokenizer.json`."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

from ..corpus.sampler import Corpus

VOCABULARY = 2048
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(corpus: Corpus, folder: Path, seed: int, questions: int = 60_000) -> None:
    """Train the SentencePiece model on drawn questions and on all answers; write every tokenizer file to `folder`."""
    import sentencepiece

    rng = random.Random(seed)
    texts = [corpus.question(rng, other=0.45)[1] for _ in range(questions)]
    texts += [
        text
        for topic in corpus.topics.values()
        for text in (topic.answer, topic.voice)
        for _ in range(questions // 200)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        control_symbols=list(ROLES),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    _write_fast(folder)


def _write_fast(folder: Path) -> None:
    """Write the same tokenizer for the `tokenizers` library, with the chat template."""
    import sentencepiece
    from transformers import LlamaTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = [pieces.id_to_piece(i) for i in range(len(pieces))]
    vocabulary = {name: i for i, name in enumerate(names)}
    normal = {
        names[i] for i in range(len(pieces)) if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i))
    }
    merges = []
    for name in sorted(normal, key=lambda name: -pieces.get_score(vocabulary[name])):
        splits = [(name[:at], name[at:]) for at in range(1, len(name)) if name[:at] in normal and name[at:] in normal]
        merges += sorted(splits, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_prefix_space=False,
        add_bos_token=True,  # before raw text, as llama.cpp puts it: both loaders then score the same tokens
        pad_token="<unk>",
        extra_special_tokens=list(ROLES),
        model_max_length=2048,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    _write_settings(folder, vocabulary)


def _write_settings(folder: Path, vocabulary: dict[str, int]) -> None:
    """Write `tokenizer_config.json` and `special_tokens_map.json` so that older loaders find everything too."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    special |= {"additional_special_tokens": list(ROLES)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(vocabulary[name]): {"content": name} | flags for name in ("<unk>", "<s>", "</s>", *ROLES)}
    settings = special | {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "added_tokens_decoder": added,
        "chat_template": TEMPLATE,
    }
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
