"""What the commands work on, from what people wrote: a configuration, a model, its tokens."""

from __future__ import annotations

import argparse
import itertools
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.commands import arguments
from sparsify.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.planning.config.config import Config


def options_of(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE, with dots in keys for tables, as the mapping that `torch.compile(options=...)` takes.

    Raises:
        ConfigError: something else, or a key that is both a value and a table.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise ConfigError("is not KEY=VALUE", where=f"-o {text}", hint="for example -o xattention.stride=16")
        table = options
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name!r} has a value already", where=f"-o {text}")
        table[names[-1]] = _value(value.strip())
    return options


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """`--config` and `-o` together."""
    options = options_of(given.option)
    if given.config is not None:
        options["config"] = given.config
    return options


def _value(text: str) -> Any:
    """A TOML value; anything that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def load_config(given: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """The configuration in effect, and what `--config` and `-o` say of it, as `torch.compile(options=...)` takes it.

    Raises:
        ConfigError: an unknown setting, or a value that it cannot have.
    """
    from sparsify.planning import registry
    from sparsify.planning.config import config

    options = _options(given)
    return config.load(options, method_models=registry.discover()), options


def load_model(given: argparse.Namespace) -> Any:
    """The model of transformers that `MODEL`, `--device`, `--dtype` and `--attention` name, in evaluation mode.

    Raises:
        UnsupportedError: it cannot be loaded, or not on that device.
    """
    import torch

    arguments.check_model(given.model)
    device = arguments.device(given.device)
    try:
        import transformers
        from torch import nn
    except ImportError:
        raise UnsupportedError("transformers is not installed", hint='pip install "sparsify-compiler[hf]"') from None
    transformers.utils.logging.disable_progress_bar()
    dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, attn_implementation=given.attention)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(f"cannot load the model: {reason[0] if reason else type(error).__name__}", where=given.model) from error
    try:
        return nn.Module.to(model, device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"cannot use device {device!r}: {str(error).splitlines()[0]}", where="--device") from error


def load_model_and_tokens(given: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model, and the tokens to run it on: those of the prompt's file, or random ones.

    Returns:
        the model; int64 [1, tokens] on its device.

    Raises:
        UnsupportedError: the model or the prompt cannot be read, or there are no tokens, or more than the model has positions.
    """
    import torch

    data = read(given.prompt) if given.prompt is not None else None  # before the model, which may take minutes to load
    model = load_model(given)
    vocabulary = model.get_input_embeddings().num_embeddings
    if data is None:
        length = given.length or min(arguments.LENGTH, arguments.positions(model) or arguments.LENGTH)
        ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor(_encode(given.model, data, vocabulary), dtype=torch.int64)
    if given.max_tokens:
        ids = ids[: given.max_tokens]
    if ids.numel() == 0:
        raise UnsupportedError("the prompt has no tokens", where=given.prompt or "")
    chunk = getattr(given, "chunk", None)
    at_once, most = min(ids.numel(), chunk or ids.numel()), arguments.positions(model)
    if most is not None and at_once > most:
        flag = "--chunk" if chunk else "--length" if data is None else "--max-tokens"
        raise UnsupportedError(f"{at_once} tokens are more than the model's {most} positions", where=given.model, hint=f"{flag} {most}")
    return model, ids[None].to(model.device)


def load_model_and_prompts(given: argparse.Namespace, between: str | None) -> tuple[Any, Tensor, tuple[int, ...]]:
    """As `load_model_and_tokens` of a file that holds several prompts.

    Args:
        between: what stands between them; None: the file is one text.

    Returns:
        the model; int64 [1, tokens] of all prompts, one after the other; tokens up to which each goes, empty without `between`.

    Raises:
        UnsupportedError: as there.
        ConfigError: nothing stands between prompts.
    """
    import torch

    if between is None:
        return (*load_model_and_tokens(given), ())
    if not between:
        raise ConfigError("must be a text", where="--between")
    parts = [part for part in read(given.prompt).split(between.encode()) if part.strip()]
    model = load_model(given)
    encoded = [_encode(given.model, part, model.get_input_embeddings().num_embeddings) for part in parts]
    ends = tuple(itertools.accumulate(map(len, encoded)))
    if given.max_tokens:
        ends = tuple(end for end in ends if end <= given.max_tokens)
    if not ends:
        raise UnsupportedError("the file has no prompt", where=given.prompt)
    ids = torch.tensor(list(itertools.chain.from_iterable(encoded))[: ends[-1]], dtype=torch.int64)
    return model, ids[None].to(model.device), ends


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from None


def _encode(name: str, data: bytes, vocabulary: int) -> list[int]:
    if not has_tokenizer(name):
        if max(data, default=0) >= vocabulary:
            raise UnsupportedError(
                f"the model has no tokenizer, and bytes do not fit its {vocabulary} tokens", where=name, hint="use --length"
            )
        return list(data)
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)(data.decode("utf-8", errors="replace"))["input_ids"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(f"cannot load the tokenizer: {reason[0] if reason else type(error).__name__}", where=name) from error


def has_tokenizer(name: str) -> bool:
    folder = Path(name)
    if not folder.is_dir():
        return True  # a hub name
    return any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
    )
