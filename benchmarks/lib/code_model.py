"""The bundled model of word pieces, which `python -m benchmarks run train_code_model` trained: benchmarks/models/code.

    python -m benchmarks.lib.code_model FOLDER     # bf16 weights and tokenizer, as `from_pretrained` and the sparsify command read them

28.5 M parameters: a Llama of 7 layers, hidden size 512, 8 query and 2 KV heads of 128, 32768 positions, 8192 word pieces. Its weights
travel as int8 with a scale a row (lib/int8_weights.py); report.json beside them says what it was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.lib import corpus, int8_weights, recall
from benchmarks.lib.needles import stdlib_text

MODEL = Path(__file__).parents[1] / "models" / "code"


def load(dtype: torch.dtype = torch.bfloat16, folder: Path = MODEL) -> LlamaForCausalLM:
    """The model, on the CPU, in eval mode."""
    return int8_weights.load(folder, dtype)


def maker(text: str | None = None, folder: Path = MODEL) -> recall.Maker:
    """Makes its questions out of `text`; out of the standard library's source, which it was not trained on, where none is given."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = stdlib_text(2_000_000).decode(errors="ignore") if text is None else text
    return recall.Maker(tokenizer, np.array(tokenizer.encode(text).ids, np.uint16), corpus.words([text], 2000))


def export(destination: Path, folder: Path = MODEL) -> None:
    """Writes configuration, bf16 weights (57 MB) and tokenizer."""
    load(folder=folder).save_pretrained(destination)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(destination)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    export(parser.parse_args(arguments).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
