"""What is read of installed packages, and how it becomes tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.lib import corpus

CODE = "def area(width, height):\n    return width * height\n" * 12


def packages(root: Path) -> Path:
    files = {
        "one/a.py": CODE,
        "one/copy.py": CODE,
        "one/LICENSE.txt": "Permission is granted. " * 40,
        "one/numbers.txt": "12345 67890\n" * 60,
        "one/short.py": "x = 1\n",
        "one/generated.py": "a" * 5000,
        "networkx/graph.py": CODE.replace("area", "volume"),
        "single.py": CODE.replace("area", "side"),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "one" / "binary.txt").write_bytes(b"\xff\xfe" * 300)
    return root


def test_licences_copies_data_and_generated_files_stay_out(tmp_path: Path) -> None:
    found, digest = corpus.documents(packages(tmp_path))
    assert [(one.package, one.text.count("\n")) for one in found] == [("networkx", 24), ("one", 24), ("single", 24)]
    assert digest == corpus.documents(tmp_path)[1]
    (tmp_path / "single.py").write_text(CODE.replace("area", "edge"))
    assert digest != corpus.documents(tmp_path)[1]
    assert len(corpus.documents(tmp_path, limit=len(CODE) + 1)[0]) == 2


def test_tokens_give_the_text_back_and_documents_end(tmp_path: Path) -> None:
    found, _ = corpus.documents(packages(tmp_path))
    tokenizer = corpus.train_tokenizer(iter([one.text for one in found]), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = corpus.encode(found, tmp_path / "tokenizer.json", 1)
    assert tokens.dtype == np.uint16
    assert (tokens == 0).sum() == len(found) and tokens[-1] == 0
    assert tokenizer.decode(tokens.tolist()) == "".join(one.text for one in found)
    assert len(tokenizer.encode("31415926").ids) == 8  # a token a digit


def test_words_are_frequent_and_no_names_of_code() -> None:
    assert corpus.words(["lantern lantern river river self.value call() Upper tiny1 river"], 2) == ["lantern", "river"]
