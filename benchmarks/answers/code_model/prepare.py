"""Corpus, tokenizer, words and provenance, before anything is trained."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.answers.code_model.setup import Setup
from benchmarks.lib import corpus


def prepare(options: argparse.Namespace, setup: Setup, began: float) -> None:
    """Corpus, tokenizer, words and provenance into the work folder; the tokenizer into `out` as transformers reads it."""
    cores = len(os.sched_getaffinity(0))

    def say(line: str) -> None:
        text = f"{time.time() - began:6.1f} s  {line}"
        print(text, flush=True)
        with (options.out / "log.txt").open("a") as stream:
            print(text, file=stream)

    found, digest = corpus.documents(options.packages, options.corpus_characters, cores)
    kept = [one for one in found if one.package not in corpus.HELD_OUT]
    held = [one for one in found if one.package in corpus.HELD_OUT]
    characters = sum(len(one.text) for one in found)
    say(f"{len(found)} files, {characters / 1e6:.1f} M characters, {len({one.package for one in found})} packages, digest {digest[:16]}")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = corpus.train_tokenizer(iter(corpus.sample(kept, setup.tokenizer_characters, setup.seed)), setup.vocabulary)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.save(str(options.work / "tokenizer.json"))
    say(f"tokenizer of {tokenizer.get_vocab_size()} tokens")
    for part, documents in (("train", kept), ("held_out", held)):
        tokens = corpus.encode(documents, options.work / "tokenizer.json", cores)
        np.save(options.work / f"{part}.npy", tokens)
        say(f"{part}: {len(tokens) / 1e6:.2f} M tokens, {sum(len(one.text) for one in documents) / len(tokens):.2f} characters each")
    (options.work / "words.json").write_text(json.dumps(corpus.words(corpus.sample(kept, 6_000_000, setup.seed + 1))))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END,
        pad_token=corpus.END,
        model_max_length=setup.positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(options.out)
    shares: dict[str, int] = {}
    for one in found:
        shares[one.package] = shares.get(one.package, 0) + len(one.text)
    provenance = {
        "corpus": {"sha256": digest, "files": len(found), "characters": characters, "packages": dict(sorted(shares.items()))},
        "held_out_packages": sorted({one.package for one in held}),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
    }
    (options.work / "provenance.json").write_text(json.dumps(provenance))
    say("prepared")


def version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
