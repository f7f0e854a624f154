"""Text to train small models on: source code and documentation of the Python packages installed here, as tokens.

Files are read package by package and in order of their paths, so that a long stretch of tokens holds files that refer to each other.
Left out: licences, data in text form, and files that are there already byte for byte. Some packages are held out for validation.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # after each file; token 0
SUFFIXES = frozenset({".py", ".pyi", ".pyx", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh"})
HELD_OUT = frozenset({"networkx", "click", "jinja2", "attr"})
_LICENCE = re.compile(r"licen[sc]e|copying|notice|authors|credits|patents|record|top_level|entry_points|sources\.txt", re.I)
MAX_FILE_BYTES = 400_000
MAX_DIGITS = 0.2  # share of a file's characters; more is a table of data
MAX_LINE = 160  # mean characters a line; more is generated


@dataclass(frozen=True)
class Document:
    """One file. package: the first part of its path below the packages' folder."""

    package: str
    text: str


def installed() -> Path:
    """The folder of the installed packages."""
    return Path(sysconfig.get_paths()["purelib"])


def paths(root: Path) -> list[Path]:
    """The files below `root` that may be text to train on, in a fixed order."""
    return sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and not _LICENCE.search(path.name) and path.is_file())


def read(path: Path) -> str | None:
    """The file's text, or None where it is too short, too long, no UTF-8, a table of data or generated."""
    try:
        data = path.read_bytes()
        if not 200 <= len(data) <= MAX_FILE_BYTES:
            return None
        text = data.decode()
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) / (text.count("\n") + 1) > MAX_LINE or sum(map(str.isdigit, text[:20_000])) > MAX_DIGITS * min(len(text), 20_000):
        return None
    return text.replace("\r\n", "\n").replace(END, "")


def documents(root: Path, limit: int | None = None, processes: int = 1) -> tuple[list[Document], str]:
    """The corpus below `root` and the digest of its texts.

    limit: about so many characters, files chosen by digest of their contents. processes: that read at a time.
    """
    files = paths(root)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        texts = pool.map(read, files, chunksize=64)
    seen: dict[bytes, int] = {}
    kept: list[tuple[bytes, Document]] = []
    for path, text in zip(files, texts, strict=True):
        if text is None or (digest := hashlib.sha256(text.encode()).digest()) in seen:
            continue
        seen[digest] = len(text)
        kept.append((digest, Document(path.relative_to(root).parts[0].removesuffix(path.suffix), text)))
    if limit is not None:
        chosen, total = set(), 0
        for digest, size in sorted(seen.items()):
            if total >= limit:
                break
            chosen.add(digest)
            total += size
        kept = [pair for pair in kept if pair[0] in chosen]
    whole = hashlib.sha256()
    for digest, _ in kept:
        whole.update(digest)
    return [document for _, document in kept], whole.hexdigest()


def words(texts: Iterable[str], count: int = 4000) -> list[str]:
    """The most frequent lower-case English-looking words of 4 to 9 letters, in alphabetic order."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w.(])", text))
    return sorted(word for word, _ in found.most_common(count))


def train_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """A byte-level BPE with `size` tokens; each digit is a token of its own, END is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample(found: list[Document], characters: int, seed: int) -> list[str]:
    """Whole files, at random, of about so many characters together."""
    order = np.random.default_rng(seed).permutation(len(found))
    chosen, total = [], 0
    for index in order:
        chosen.append(found[index].text)
        total += len(chosen[-1])
        if total >= characters:
            break
    return chosen


def _encode(tokenizer: str, texts: list[str]) -> np.ndarray:
    # Tokenizer objects do not travel between processes as cheaply as they are made from their file
    encoder = _loaded(tokenizer)
    return np.concatenate([np.array([*encoding.ids, 0], np.uint16) for encoding in encoder.encode_batch_fast(texts)])


_cache: dict[str, Tokenizer] = {}


def _loaded(path: str) -> Tokenizer:
    if path not in _cache:
        _cache[path] = Tokenizer.from_file(path)
    return _cache[path]


def encode(found: list[Document], tokenizer: Path, processes: int) -> np.ndarray:
    """The documents' tokens [n] uint16, in order, each document followed by END."""
    groups: list[list[str]] = [[]]
    size = 0
    for document in found:
        groups[-1].append(document.text)
        size += len(document.text)
        if size > 500_000:
            groups.append([])
            size = 0
    groups = [group for group in groups if group]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return np.concatenate(pool.map(partial(_encode, str(tokenizer)), groups, chunksize=1))
