"""What the user asked for: defaults, files, environment and options merged into one typed, frozen `Config`.

Sources, each overriding the one before: the defaults, `sparsify.toml` in the working folder, the file that `SPARSIFY_CONFIG` names,
`SPARSIFY_TRACE`, then `options={...}` of `torch.compile` (whose key `config` may name a file, applied before the other options).
Tables merge key by key; everything else, the list of rules too, is replaced as a whole. Every mistake is a `ConfigError`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsify.costs.crossovers import MAX_COST_RATIO
from sparsify.errors import ConfigError, nearest
from sparsify.planning.config import inductor_options, layer_patterns
from sparsify.planning.config.values import is_list, is_path, is_sequence, is_table

log = logging.getLogger(__name__)

FILE_NAME = "sparsify.toml"
CONFIG_VARIABLE = "SPARSIFY_CONFIG"
TRACE_VARIABLE = "SPARSIFY_TRACE"

_said: set[str] = set()  # files of which it was said in this process that they are used


class Rule(BaseModel):
    """Which methods are tried, in order, on the layers that a pattern names.

    layers: patterns; a layer matches when any of them does. `3` and `4-27` (both ends included) compare with the layer's number; any
        other pattern is a glob on the site's path, such as `model.layers.*.self_attn`; with `#1` at its end it means the second site only
        where several have one path.
    method: method names; an empty tuple leaves those sites as they are.
    options: by method, overrides of its own table. In files they stand beside `method`, where each goes to every listed method that
        has it, or in a subtable named like the method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    layers: tuple[str, ...]
    method: tuple[str, ...]
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def matches(self, name: str, layer: int | None, ordinal: int = 0) -> bool:
        """Whether a site of this path, with this number in it, is meant; ordinal: its place among the graph's sites of this path."""
        return any(layer_patterns.matches(pattern, name, layer, ordinal) for pattern in self.layers)


# Who names the exact method for attention means tokens over a SparseCache, too: attention of these is a site of another kind.
ATTENTION, CACHE_STEP = "dense", "kv_evict"


class Config(BaseModel):
    """The effective configuration. Field descriptions are the reference that docs/configuration.md is generated from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    passes: tuple[str, ...] = Field(
        ("xattention", "dense", "kv_evict", "ffn_parts"),
        description="Methods to try on every site that no rule names, in order of preference. `[]` changes nothing. `dense` brings "
        "`kv_evict` along, which is as exact: a token over a `SparseCache`, as one op.",
    )
    exact: bool = Field(False, description="Only methods that keep the result: everything lossy is left out, whatever else asks for it.")
    strict: bool = Field(False, description="Raise where sparsify would otherwise warn and fall back to the untouched graph.")
    share_layers: bool = Field(
        True,
        description="Inductor compiles one of each kind of layer that a graph repeats, and the graph calls it for all of them. "
        "Off: the whole graph at once. CUDA graphs (`mode`) take the whole graph in any case.",
    )
    validation: bool = Field(
        True,
        description="Run what was proved about a site before it is rewritten: the mask's own nodes against the rewriting, on small random "
        "inputs. A site whose claim does not hold stays as it is.",
    )
    verify: bool = Field(False, description="Also run the rewritten graph on the example inputs with keep-all settings and compare.")
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto", description="What serves the ops. `auto`: Triton on CUDA, C++ for attention and its blocks on CPUs, else the reference."
    )
    linear_kernels: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether linear layers of at most 16 rows, such as those of a generated token, are joined with their norms, gates and "
        "sums and run by generated kernels. `auto`: on GPUs that Triton kernels serve. `always`: anywhere, by the reference elsewhere.",
    )
    peer_sums: bool = Field(
        True,
        description="Sums of a few kilobytes over the processes of tensor parallelism, those of a generated token, are read from the "
        "memory of the other GPUs where these can and it is expected to be faster. Off: NCCL makes all of them.",
    )
    min_length: Literal["auto"] | int = Field(
        "auto", description="Key length, in tokens, from which lossy prefill methods act. `auto`: solved from the cost model."
    )
    max_cost_ratio: float = Field(
        MAX_COST_RATIO,
        gt=0,
        le=1,
        description="Largest share of dense attention's time that a lossy method may be expected to take where it acts without being asked "
        'for a density: with `min_length = "auto"`, less saved is no price for an answer.',
    )
    rules: tuple[Rule, ...] = Field((), description="Methods for particular layers; the last rule that matches a site decides alone.")
    plan: Path | None = Field(
        None,
        description="A plan file. Its decisions replace the choice made here; with `objective` or `max_error` it tells what was measured.",
    )
    objective: Literal["time", "memory", "balanced"] | None = Field(
        None,
        description="What to minimise among the methods that may act: expected seconds, bytes of scratch, or both relative to dense "
        "attention's. Unset: the first in order that is expected to pay.",
    )
    max_error: float | None = Field(
        None, ge=0, description="Largest error that the plan file may have measured for a lossy method where it acts; needs `plan`."
    )
    mode: str | None = Field(None, description="One of Inductor's modes, as `mode=` of `torch.compile`.")
    inductor: dict[str, Any] = Field(default_factory=dict, description="Inductor's own options, as `options=` of its backend takes them.")
    lower: Literal["inductor", "eager"] = Field(
        "inductor", description="What compiles the rewritten graph. `eager` runs it uncompiled, for debugging and tests."
    )
    compile_ahead: bool = Field(
        True,
        description="Compile kernels in a process beside this one while Inductor still compiles the graph that calls them, and those of "
        "other lengths after them. Off: each kernel is compiled when it is first launched.",
    )
    progress: bool = Field(
        True, description="Tell on the terminal of what takes more than two seconds: compiling, and long prompts of `generate()`."
    )
    trace: Path | None = Field(None, description="Folder for readable dumps of every stage; `SPARSIFY_TRACE` sets it too.")
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of each method. In files and options these are tables at the top level, by method name."
    )

    def for_layer(
        self, name: str, layer: int | None, kind: Container[str] | None = None, ordinal: int = 0
    ) -> list[tuple[str, dict[str, Any]]]:
        """Methods to try on a site, in order, each with the options that differ from its defaults.

        The last rule that matches decides alone; without one, `passes` does. Lossy methods are not left out here.

        Args:
            name: the site's path, such as `model.layers.3.self_attn`.
            layer: the last integer in that path, None without one.
            kind: the methods that exist for this kind of site; rules that name only others are passed over. None: all.
            ordinal: the site's place among the graph's sites of this path, from 0.
        """
        for rule in reversed(self.rules):
            methods = [m for m in rule.method if kind is None or m in kind]
            if rule.matches(name, layer, ordinal) and (methods or not rule.method):
                return [(method, _merge(self.methods.get(method, {}), rule.options.get(method, {}))) for method in methods]
        tried = self.passes if kind is None or ATTENTION in kind else self.every_pass
        return [(method, _merge(self.methods.get(method, {}), {})) for method in tried if kind is None or method in kind]

    @property
    def every_pass(self) -> tuple[str, ...]:
        """`passes`, and what they bring along for sites that they do not serve themselves."""
        brought = (CACHE_STEP,) if ATTENTION in self.passes and CACHE_STEP not in self.passes else ()
        return (*self.passes, *brought)

    def as_options(self) -> dict[str, Any]:
        """`options={...}` that give this configuration again, whatever the files say."""
        settings = self.model_dump(include=set(SETTINGS) - {"inductor", "rules"}, mode="json")
        rules = [{"layers": list(rule.layers), "method": list(rule.method), **rule.options} for rule in self.rules]
        return {**settings, "rules": rules, "inductor": dict(self.inductor), **_merge(self.methods, {})}

    def inductor_patches(self) -> dict[str, Any]:
        """`config_patches` for Inductor's `compile_fx`: what the mode sets, then the explicit options."""
        return {**inductor_options.mode_options(self.mode), **self.inductor}

    def digest(self) -> str:
        """Hex SHA-256 over all that can change the compiled result: every setting but `trace`, and the plan file's content."""
        settings = self.model_dump(exclude={"trace", "plan"})
        plan = self.plan and (self.plan.read_bytes().hex() if self.plan.is_file() else str(self.plan))
        return hashlib.sha256(json.dumps([settings, plan], sort_keys=True, default=repr).encode()).hexdigest()


SETTINGS = tuple(name for name in Config.model_fields if name != "methods")


def load(
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    *,
    method_models: Mapping[str, type[BaseModel]],
    cwd: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Merges all sources and validates after each, so that an error names the source that caused it.

    Args:
        options, mode: as given to `torch.compile`.
        method_models: for each method its model, whose fields are the options that its table and rules may set.
        cwd, environ: instead of the process's own, for tests.

    Raises:
        ConfigError: with file and dotted key, what is wrong, and the nearest valid name.
    """
    folder = Path.cwd() if cwd is None else Path(cwd)
    merger = _Merger(method_models)
    environ = os.environ if environ is None else environ
    if os.path.lexists(folder / FILE_NAME):  # a link to nowhere is an error, not an absent file
        merger.add_file(folder / FILE_NAME, FILE_NAME)
        _say_found(folder / FILE_NAME, merger.raw)
    if environ.get(CONFIG_VARIABLE):
        merger.add_file(folder / Path(environ[CONFIG_VARIABLE]).expanduser(), f"{CONFIG_VARIABLE}={environ[CONFIG_VARIABLE]}")
    if environ.get(TRACE_VARIABLE):
        merger.add({"trace": environ[TRACE_VARIABLE]}, TRACE_VARIABLE, folder)
    if options is not None and not is_table(options):
        raise ConfigError(f"must be a mapping, not {_show(options)}", where="options", hint='for example options={"passes": ["dense"]}')
    given = dict(options or {})
    if (named := given.pop("config", None)) is not None:
        if not is_path(named):
            raise ConfigError(f"must name a file, not {_show(named)}", where="options: config")
        merger.add_file(folder / Path(named).expanduser(), os.fspath(named))
    if mode is not None:
        if given.get("mode", mode) != mode:
            raise ConfigError(f"mode={mode!r} contradicts options' mode={given['mode']!r}", where="mode", hint="give one of them")
        given["mode"] = mode
    merger.add(given, "options", folder)
    if merger.config.max_error is not None and merger.config.plan is None:
        raise ConfigError("needs a plan file with measured errors", where="max_error", hint="`sparsify calibrate errors` writes one")
    return merger.config


def _say_found(path: Path, table: Mapping[str, Any]) -> None:
    """Nobody asked for a file that happens to lie in the working folder, and it may turn lossy methods on and name folders to write to."""
    if (name := os.path.abspath(path)) not in _said:  # noqa: PTH100  (resolving would follow links)
        _said.add(name)
        log.warning("the configuration in the working folder is used: %s sets %s", name, ", ".join(sorted(table)) or "nothing")


class _Merger:
    """The merged tables so far, and the valid `Config` that they make."""

    def __init__(self, method_models: Mapping[str, type[BaseModel]]):
        self.models = dict(method_models)
        for name in self.models:
            if name in Config.model_fields or name == "config":
                raise ConfigError("a method may not be named like a setting", where=name, hint="rename the method")
        self.raw: dict[str, Any] = {}
        self.config = Config.model_validate({})

    def add_file(self, path: Path, source: str) -> None:
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ConfigError(
                f"cannot be read: {getattr(error, 'strerror', None) or error}", where=source, hint=f"looked at {path}"
            ) from None
        try:
            table = tomllib.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise ConfigError("is not UTF-8 text", where=source, hint="a configuration is a TOML file") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"is not TOML: {error}", where=source) from None
        self.add(table, source, path.parent)

    def add(self, table: Mapping[str, Any], source: str, folder: Path) -> None:
        """Merges one source over the others. Relative paths in it start at `folder`."""
        table = {key: _plain(value, f"{source}: {key}") if key != "inductor" else value for key, value in table.items()}
        for key in table:
            if key not in SETTINGS and key not in self.models:
                self._unknown_key(key, source)
        for key in ("plan", "trace"):
            if isinstance(table.get(key), str):
                if not table[key]:
                    raise ConfigError("must name a path, not ''", where=f"{source}: {key}")
                table[key] = str(folder / Path(table[key]).expanduser())
        for key in [*self.models, "inductor"]:
            if key in table and not is_table(table[key]):
                raise ConfigError(f"must be a table, not {_show(table[key])}", where=f"{source}: {key}")
        if "inductor" in table:
            table["inductor"] = inductor_options.flatten(table["inductor"], source)
        if "rules" in table:
            table["rules"] = [self._rule(rule, f"{source}: rules[{i}]") for i, rule in enumerate(_list(table["rules"], f"{source}: rules"))]
        self.raw = _merge(self.raw, table)
        self.config = self._validate(source)

    def _validate(self, source: str) -> Config:
        settings = {key: value for key, value in self.raw.items() if key in SETTINGS and key != "inductor"}
        config = validate(Config, settings, source)
        for i, name in enumerate(self.raw.get("passes", ())):
            self._known_method(name, f"{source}: passes[{i}]")
        if config.min_length != "auto" and config.min_length < 0:
            raise ConfigError(f"must be 'auto' or at least 0, not {config.min_length}", where=f"{source}: min_length")
        if "plan" in self.raw and config.plan is not None and not os.path.isfile(config.plan):  # noqa: PTH113  Path.is_file raises on odd names
            raise ConfigError(f"no such file: {config.plan}", where=f"{source}: plan")
        tables = {name: self.raw[name] for name in self.models if name in self.raw}
        for name, table in tables.items():
            validate(self.models[name], table, source, name)
        for i, rule in enumerate(config.rules):
            for name in rule.method:
                merged = _merge(tables.get(name, {}), rule.options.get(name, {}))
                validate(self.models[name], merged, source, f"rules[{i}]")
        inductor = self.raw.get("inductor", {})
        inductor_options.check_mode(config.mode, inductor, source)
        return config.model_copy(update={"methods": tables, "inductor": inductor})

    def _rule(self, rule: Any, where: str) -> dict[str, Any]:
        """A rule's flat table with its options sorted by the methods that have them."""
        if not is_table(rule):
            raise ConfigError(f"must be a table, not {_show(rule)}", where=where, hint="write [[rules]]")
        for key in ("layers", "method"):
            if key not in rule:
                raise ConfigError(f"needs the key {key!r}", where=where, hint=f"it has {', '.join(map(str, rule)) or 'none'}")
        methods = [rule["method"]] if isinstance(rule["method"], str) else _list(rule["method"], f"{where}.method")
        for name in methods:
            self._known_method(name, f"{where}.method")
        own: dict[str, dict[str, Any]] = {name: rule[name] for name in methods if is_table(rule.get(name))}
        flat = {key: value for key, value in rule.items() if key not in ("layers", "method", *own)}
        fields = {name: set(self.models[name].model_fields) for name in methods}
        for key in flat:
            if not any(key in names for names in fields.values()):
                known = sorted(set[str]().union(*fields.values()))
                label = f"not an option of {' or '.join(methods)}" if methods else "an option without a method"
                raise ConfigError(label, where=f"{where}.{key}", hint=nearest(key, ["layers", "method", *known]))
        options = {name: {key: flat[key] for key in flat if key in fields[name]} | own.get(name, {}) for name in methods}
        return {"layers": layer_patterns.parse(rule["layers"], f"{where}.layers"), "method": methods, "options": options}

    def _known_method(self, name: Any, where: str) -> None:
        if not isinstance(name, str):
            raise ConfigError(f"must be a method's name, not {_show(name)}", where=where)
        if name not in self.models:
            raise ConfigError(f"there is no method {name!r}", where=where, hint=nearest(name, self.models))

    def _unknown_key(self, key: Any, source: str) -> NoReturn:
        if not isinstance(key, str):
            raise ConfigError(f"keys are strings, not {_show(key)}", where=source)
        if key.replace("-", "_") in inductor_options.known_options():
            raise ConfigError("unknown key", where=f"{source}: {key}", hint="it is one of Inductor's options: put it under `inductor`")
        hint = nearest(key, [*SETTINGS, *self.models])
        if owners := [f"`{name}`" for name, model in self.models.items() if key in model.model_fields]:
            meant = f"; or {hint}" if hint.startswith("did you mean") else ""
            hint = f"it is an option of {', '.join(owners)}: put it into a method's own table{meant}"
        raise ConfigError("unknown key", where=f"{source}: {key}", hint=hint)


def validate(model: type[BaseModel], table: Mapping[str, Any], source: str, key: str = "") -> Any:
    """`model` made from a plain table, without conversions between types: "8", 8.0 and true are not integers.

    Args:
        source, key: file and dotted key of the table, for messages.

    Raises:
        ConfigError: for the first key that is unknown, missing, of a wrong type or out of range.
    """
    try:
        # pydantic's strict mode refuses a list for a tuple and a string for a Path in Python values, but takes both from JSON
        return model.model_validate_json(json.dumps(table), strict=True)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
        path = _place(table, errors[0]["loc"])
        same = [error for error in errors if _place(table, error["loc"]) == path]
    if path:
        key = (key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)).lstrip(".")
    place = f"{source}: {key}" if key else source
    kind = same[0]["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        raise ConfigError("unknown key", where=place, hint=nearest(str(path[-1]), _fields(model, path[:-1]))) from None
    if kind == "missing":
        raise ConfigError(f"needs the key {same[0]['loc'][-1]!r}", where=place) from None
    words = list(dict.fromkeys(_words(error["msg"]) for error in same))
    given = same[0]["input"]
    hint = nearest(given, re.findall(r"'([^']*)'", same[0]["msg"])) if kind == "literal_error" and isinstance(given, str) else ""
    suffix = f", not {_show(given)}" if path and kind not in ("value_error", "assertion_error") else ""
    message = " or ".join([words[0], *(word.removeprefix("must be ") for word in words[1:])])
    raise ConfigError(message + suffix, where=place, hint=hint) from None


def _fields(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys of a model, or of the class that a path within it leads to."""
    for step in path:
        if isinstance(step, str) and model is not None:
            model = next((one for one in get_args(get_type_hints(model).get(step)) if isinstance(one, type)), None)
    return [*(getattr(model, "model_fields", None) or getattr(model, "__annotations__", ()))]


def _place(table: Any, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of pydantic's location that exists in the input; the rest names branches of unions."""
    path: list[int | str] = []
    for step in location:
        try:
            table = table[step]
        except (KeyError, IndexError, TypeError):
            break
        path.append(step)
    return tuple(path)


def _words(message: str) -> str:
    message = re.sub(r"^(Value error|Assertion failed), ", "", message)
    message = re.sub(r"^Input should be (a valid (?=\w))?", lambda match: "must be " + ("a " if match[1] else ""), message)
    return (
        message.replace("must be a array", "must be a list")
        .replace("must be a integer", "must be an integer")
        .replace("dictionary", "table")
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(value: Any, where: str) -> list[Any]:
    if not is_sequence(value):
        raise ConfigError(f"must be a list, not {_show(value)}", where=where)
    return list(value)


def _plain(value: Any, where: str) -> Any:
    """The value in JSON's types: tuples become lists, paths strings.

    Raises:
        ConfigError: for anything else, such as a date or a tensor.
    """
    if is_table(value):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"keys are strings, not {_show(key)}", where=where)
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if is_sequence(value):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if is_path(value):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(f"must be a string, number, boolean, list or table, not {_show(value)}", where=where)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key, `above` first. The result shares no table or list with either."""
    merged = {key: _copy(value) for key, value in below.items()}
    for key, value in above.items():
        both = is_table(value) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else _copy(value)
    return merged


def _copy(value: Any) -> Any:
    # not copy.deepcopy: Inductor's options may hold objects that cannot be copied
    if is_table(value):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if is_list(value) else value
