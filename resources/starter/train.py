"""Make the starter model: tokenizer, base model, voice adapter, GGUF.

Everything is made from the text in `corpus/`, which was written for Weft. Run it in Weft's core environment
(torch, transformers, peft) with `sentencepiece` added, and for the GGUF `gguf`; two processor cores are enough:

    python resources/starter/train.py --converter path/to/llama.cpp/convert_hf_to_gguf.py

The converter is part of llama.cpp; llama-cpp-python's source package holds it under `vendor/llama.cpp`.
One step alone: `--only tokenizer`, `base`, `voice` or `gguf`. `--out` writes elsewhere, for a try.
The same seed gives the same training data; the weights are then the same too, on the same machine with the same
number of threads, as long as the step limit and not the time limit ends the training.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
STEPS = ("tokenizer", "base", "voice", "gguf")


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument(
        "--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py; without it no GGUF is written"
    )
    parser.add_argument("--only", choices=STEPS, help="make only this; the others must be there already")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the base model")
    parser.add_argument("--voice-steps", type=int, default=500, help="training steps of the adapter")
    parser.add_argument("--minutes", type=float, default=60, help="end a training after this long")
    parser.add_argument(
        "--further", action="store_true", help="train the base model and the adapter that are there further"
    )
    options = parser.parse_args()
    make(options)


def make(options: argparse.Namespace) -> None:
    """Take the steps in order."""
    import torch

    from starter.corpus.sampler import Corpus
    from starter.steps.base import make_base
    from starter.steps.gguf import make_gguf
    from starter.steps.tokenizer import make_tokenizer
    from starter.steps.training import Run
    from starter.steps.voice import make_voice

    def run(steps: int) -> Run:
        return Run(options.seed, steps, options.minutes * 60, report, options.further)

    torch.set_num_threads(options.threads)
    corpus, model = Corpus(), options.out / "model"
    wanted = [options.only] if options.only else STEPS
    if "tokenizer" in wanted:
        make_tokenizer(corpus, model, options.seed)
    if "base" in wanted:
        make_base(corpus, model, run(options.steps))
    if "voice" in wanted:
        make_voice(corpus, model, options.out / "voice-adapter", run(options.voice_steps))
    if "gguf" in wanted and options.converter:
        make_gguf(options.converter, model, options.out / "weft-starter-f16.gguf")


def report(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
