from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sparsify.errors import ConfigError
from sparsify.planning.config import config
from sparsify.planning.config.config import Config, Rule


class Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Blocks(Method):
    stride: Literal[4, 8, 16] = 8
    pool: Literal["sum", "max"] = "max"
    threshold: float | tuple[float, ...] = 0.95
    window: int = 0


class Window(Method):
    sinks: int = Field(4, ge=0)
    window: int = Field(1024, ge=1)

    @field_validator("window")
    @classmethod
    def _even(cls, value):
        if value % 2:
            raise ValueError("must be even")
        return value


MODELS = {"xattention": Blocks, "dense": Method, "kv_evict": Method, "ffn_parts": Method, "sink_window": Window}


def load(options=None, mode=None, cwd="/nonexistent", environ=None):
    return config.load(options, mode, method_models=MODELS, cwd=cwd, environ=environ or {})


def write(folder, text, name="sparsify.toml"):
    (folder / name).write_text(text)
    return folder / name


def test_defaults_need_no_source():
    assert load() == Config()
    assert load().for_layer("model.layers.0.self_attn", 0) == [("xattention", {}), ("dense", {}), ("kv_evict", {}), ("ffn_parts", {})]


def test_later_sources_win_and_tables_merge(tmp_path):
    write(tmp_path, 'exact = true\nmin_length = 1\n[xattention]\nstride = 4\npool = "sum"\nthreshold = 0.5\n')
    write(tmp_path, 'min_length = 2\n[xattention]\npool = "max"\nthreshold = [0.5, 1]\n', "named.toml")
    write(tmp_path, "min_length = 3\n[xattention]\nstride = 16\n", "option.toml")
    found = load({"config": "option.toml", "passes": ["xattention"]}, cwd=tmp_path, environ={"SPARSIFY_CONFIG": "named.toml"})
    assert (found.exact, found.min_length, found.passes) == (True, 3, ("xattention",))
    assert found.for_layer("", None) == [("xattention", {"stride": 16, "pool": "max", "threshold": [0.5, 1]})]
    assert load({"config": "option.toml", "min_length": 4}, cwd=tmp_path).min_length == 4


def test_rules_of_a_later_source_replace_earlier_ones(tmp_path):
    write(tmp_path, '[[rules]]\nlayers = "0"\nmethod = "dense"\n[[rules]]\nlayers = "1"\nmethod = "dense"\n')
    assert len(load(cwd=tmp_path).rules) == 2
    assert load({"rules": [{"layers": 5, "method": []}]}, cwd=tmp_path).rules == (Rule(layers=("5",), method=()),)


def test_the_last_matching_rule_decides_alone():
    found = load(
        {
            "xattention": {"stride": 4, "threshold": 0.9},
            "rules": [
                {"layers": "4-27", "method": ["sink_window", "xattention"], "window": 64},
                {"layers": "model.layers.*.cross_attn", "method": "dense"},
                {"layers": "6", "method": "xattention", "threshold": 0.99},
                {"layers": "7", "method": []},
            ],
        }
    )
    defaults = [("xattention", {"stride": 4, "threshold": 0.9}), ("dense", {}), ("kv_evict", {}), ("ffn_parts", {})]
    assert found.for_layer("model.layers.3.self_attn", 3) == defaults
    assert found.for_layer("model.layers.5.self_attn", 5) == [
        ("sink_window", {"window": 64}),
        ("xattention", {"stride": 4, "threshold": 0.9, "window": 64}),
    ]
    assert found.for_layer("model.layers.5.cross_attn", 5) == [("dense", {})]
    assert found.for_layer("model.layers.6.cross_attn", 6) == [("xattention", {"stride": 4, "threshold": 0.99})]
    assert found.for_layer("model.layers.7.self_attn", 7) == []


def test_a_rule_may_hold_one_table_per_method():
    rule = {"layers": "0", "method": ["sink_window", "xattention"], "window": 4, "xattention": {"window": 6, "stride": 16}}
    assert load({"rules": [rule]}).for_layer("", 0) == [("sink_window", {"window": 4}), ("xattention", {"window": 6, "stride": 16})]
    with pytest.raises(ConfigError, match=r"rules\[0\]\.strid: unknown key \(did you mean 'stride'"):
        load({"rules": [{**rule, "xattention": {"strid": 16}}]})
    with pytest.raises(ConfigError, match=r"rules\[0\]\.dense: not an option"):
        load({"rules": [{**rule, "dense": {}}]})


def test_options_give_the_same_configuration_again(tmp_path):
    write(tmp_path, "exact = true\n[xattention]\nstride = 4\n[[rules]]\nlayers = 3\nmethod = ['sink_window', 'xattention']\nwindow = 8\n")
    found = load({"inductor": {"triton.cudagraphs": True}, "min_length": 3, "trace": "dumps"}, mode="reduce-overhead", cwd=tmp_path)
    assert load(found.as_options()) == found
    assert load(found.as_options(), cwd=tmp_path) == found
    assert load(Config().as_options(), cwd=tmp_path).rules == ()


def test_what_for_layer_returns_is_a_copy():
    found = load({"passes": ["xattention"], "xattention": {"threshold": [0.5]}})
    found.for_layer("", None)[0][1]["threshold"].append(1.0)
    assert found.for_layer("", None) == [("xattention", {"threshold": [0.5]})]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("3", {3}),
        (3, {3}),
        ("1-2", {1, 2}),
        ("0, 2,3-4", {0, 2, 3, 4}),
        (["0", "4"], {0, 4}),
        ([0, "2-3"], {0, 2, 3}),
        ("*", {0, 1, 2, 3, 4}),
        ("model.layers.[01].self_attn", {0, 1}),
        ("model.layers.1.self_attn", {1}),
        ("layers.1.self_attn", set()),
        ("model.layers.*.mlp", set()),
        ("11", set()),
    ],
)
def test_layer_patterns(layers, expected):
    (rule,) = load({"rules": [{"layers": layers, "method": "dense"}]}).rules
    assert {i for i in range(5) if rule.matches(f"model.layers.{i}.self_attn", i)} == expected


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_ranges_include_both_ends(first, last, layer):
    if first > last:
        with pytest.raises(ConfigError, match=f"write '{last}-{first}'"):
            load({"rules": [{"layers": f"{first}-{last}", "method": "dense"}]})
        return
    (rule,) = load({"rules": [{"layers": f"{first}-{last}", "method": "dense"}]}).rules
    assert rule.matches("anything", layer) == (first <= layer <= last)
    assert not rule.matches(f"model.layers.{layer}", None)


RULE = {"layers": "0", "method": "dense"}
WRONG = [
    ({"pases": []}, "options: pases: unknown key (did you mean 'passes'?)"),
    ({"xatention": {}}, "options: xatention: unknown key (did you mean 'xattention'?)"),
    ({"max_autotune": True}, "options: max_autotune: unknown key (it is one of Inductor's options: put it under `inductor`)"),
    ({"sinks": 8}, "options: sinks: unknown key (it is an option of `sink_window`: put it into a method's own table)"),
    ({"stride": 8}, "(it is an option of `xattention`: put it into a method's own table; or did you mean 'strict'?)"),
    ({"passes": "dense"}, "options: passes: must be a list, not 'dense'"),
    ({"passes": ["dens"]}, "options: passes[0]: there is no method 'dens' (did you mean 'dense'?)"),
    ({"passes": ["dense", 3]}, "options: passes[1]: must be a string, not 3"),
    ({"strict": 1}, "options: strict: must be a boolean, not 1"),
    ({"min_length": True}, "options: min_length: must be 'auto' or an integer, not True"),
    ({"min_length": -1}, "options: min_length: must be 'auto' or at least 0, not -1"),
    ({"kernels": "tritn"}, "options: kernels: must be 'auto', 'triton' or 'reference', not 'tritn' (did you mean 'triton'?)"),
    ({"plan": "absent.json"}, "no such file: /nonexistent/absent.json"),
    ({"plan": ""}, "options: plan: must name a path, not ''"),
    ({"trace": 3}, "options: trace: must be a string, not 3"),
    ({"mode": "reduce_overhead"}, "options: mode: there is no mode 'reduce_overhead' (did you mean 'reduce-overhead'?)"),
    ({"xattention": 3}, "options: xattention: must be a table, not 3"),
    ({"xattention": {"strid": 8}}, "options: xattention.strid: unknown key (did you mean 'stride'?)"),
    ({"xattention": {"stride": 7}}, "options: xattention.stride: must be 4, 8 or 16, not 7"),
    ({"xattention": {"stride": "8"}}, "options: xattention.stride: must be 4, 8 or 16, not '8'"),
    ({"xattention": {"threshold": [0.5, float("nan")]}}, "options: xattention.threshold"),
    ({"sink_window": {"window": -4}}, "options: sink_window.window: must be greater than or equal to 1, not -4"),
    ({"sink_window": {"window": True}}, "options: sink_window.window: must be an integer, not True"),
    ({"sink_window": {"window": 8.0}}, "options: sink_window.window: must be an integer, not 8.0"),
    ({"sink_window": {"window": 3}}, "options: sink_window.window: must be even"),
    ({"sink_window": {"window": object}}, "options: sink_window.window: must be a string, number, boolean, list or table"),
    ({"dense": {"x": 1}}, "options: dense.x: unknown key"),
    ({"rules": RULE}, "options: rules: must be a list"),
    ({"rules": ["dense"]}, "options: rules[0]: must be a table, not 'dense' (write [[rules]])"),
    ({"rules": [RULE, {"layer": 3, "method": "dense"}]}, "options: rules[1]: needs the key 'layers' (it has layer, method)"),
    ({"rules": [{**RULE, "method": "dens"}]}, "options: rules[0].method: there is no method 'dens' (did you mean 'dense'?)"),
    ({"rules": [{**RULE, "method": 3}]}, "options: rules[0].method: must be a list, not 3"),
    ({"rules": [{**RULE, "window": 8}]}, "options: rules[0].window: not an option of dense"),
    (
        {"rules": [{**RULE, "method": "sink_window", "windw": 8}]},
        "options: rules[0].windw: not an option of sink_window (did you mean 'window'?)",
    ),
    ({"rules": [{**RULE, "method": "sink_window", "window": 0}]}, "options: rules[0].window: must be greater than or equal to 1, not 0"),
    ({"rules": [{**RULE, "layers": "9-4"}]}, "options: rules[0].layers: the range '9-4' is empty (write '4-9')"),
    ({"rules": [{**RULE, "layers": "4:9"}]}, "options: rules[0].layers: '4:9' is not a layer pattern"),
    ({"rules": [{**RULE, "layers": "-3"}]}, "options: rules[0].layers: '-3' is not a layer pattern"),
    ({"rules": [{**RULE, "layers": "1,,2"}]}, "options: rules[0].layers: '' is not a layer pattern"),
    ({"rules": [{**RULE, "layers": "layers.[0-3"}]}, "options: rules[0].layers: 'layers.[0-3' has an unbalanced bracket"),
    ({"rules": [{**RULE, "layers": []}]}, "options: rules[0].layers: names no layer"),
    ({"rules": [{**RULE, "layers": True}]}, "options: rules[0].layers: must be a layer pattern or a list of them, not True"),
    ({"inductor": {"max_autotun": True}}, "options: inductor.max_autotun: Inductor has no such option (did you mean 'max_autotune'?)"),
    ({"inductor": {"max_autotune": 1}}, "options: inductor.max_autotune: must be bool, not 1"),
    ({"inductor": 3}, "options: inductor: must be a table, not 3"),
    ({3: 4}, "options: keys are strings, not 3"),
    ({"config": 3}, "options: config: must name a file, not 3"),
    ({"config": "absent.toml"}, "absent.toml: cannot be read: No such file or directory"),
    ([("passes", [])], "options: must be a mapping"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_mistakes_are_one_clear_message(options, message):
    with pytest.raises(ConfigError) as caught:
        load(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = [", "sparsify.toml: is not TOML: "),
        ("strict = 2020-01-01", "sparsify.toml: strict: must be a string, number, boolean, list or table"),
        ("stric = true", "sparsify.toml: stric: unknown key (did you mean 'strict'?)"),
        ("config = 'other.toml'", "sparsify.toml: config: unknown key"),
        ("[xattention]\nstride = 5", "sparsify.toml: xattention.stride: must be 4, 8 or 16, not 5"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(cwd=tmp_path)
    assert message in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"SPARSIFY_CONFIG=none\.toml: cannot be read: No such file"):
        load(cwd=tmp_path, environ={"SPARSIFY_CONFIG": "none.toml"})
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load({"config": "bytes.toml"}, cwd=tmp_path)
    (tmp_path / "sparsify.toml").mkdir()
    with pytest.raises(ConfigError, match=r"sparsify\.toml: cannot be read: Is a directory"):
        load(cwd=tmp_path)


def test_a_link_to_nowhere_is_not_an_absent_file(tmp_path):
    (tmp_path / "sparsify.toml").symlink_to(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(cwd=tmp_path)


def test_a_value_is_checked_with_what_earlier_files_said(tmp_path):
    write(tmp_path, '[[rules]]\nlayers = "0"\nmethod = "sink_window"\nsinks = 0\n')
    with pytest.raises(ConfigError, match=r"options: sink_window\.window: must be even"):
        load({"sink_window": {"window": 7}}, cwd=tmp_path)


def test_paths_start_at_the_file_that_names_them(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "plan = 'plan.json'\ntrace = 'dumps'\n", "named.toml")
    (tmp_path / "sub" / "plan.json").write_text("{}")
    found = load({"config": tmp_path / "sub" / "named.toml"}, cwd=tmp_path)
    assert (found.plan, found.trace) == (tmp_path / "sub" / "plan.json", tmp_path / "sub" / "dumps")
    assert load({"trace": Path("here")}, cwd=tmp_path).trace == tmp_path / "here"


def test_the_trace_variable_yields_to_options(tmp_path):
    assert load(environ={"SPARSIFY_TRACE": "/a"}).trace == Path("/a")
    assert load({"trace": "/b"}, environ={"SPARSIFY_TRACE": "/a"}).trace == Path("/b")
    assert load(environ={"SPARSIFY_TRACE": "", "SPARSIFY_CONFIG": ""}) == Config()


def test_modes():
    assert load(mode="max-autotune-no-cudagraphs").inductor_patches() == {"max_autotune": True, "coordinate_descent_tuning": True}
    assert load({"mode": "default"}, mode="default").mode == "default"
    with pytest.raises(ConfigError, match="mode='default' contradicts"):
        load({"mode": "reduce-overhead"}, mode="default")
    with pytest.raises(ConfigError, match=r"inductor\.triton\.cudagraphs: mode 'reduce-overhead' sets it to True, not False"):
        load({"inductor": {"triton.cudagraphs": False}}, mode="reduce-overhead")


def test_inductor_options_by_table_or_dotted_name(tmp_path):
    def hook(graph):
        return None

    write(tmp_path, "[inductor]\nmax-autotune = true\n[inductor.triton]\ncudagraphs = true\n")
    found = load({"inductor": {"post_grad_custom_post_pass": hook, "cpp.simdlen": 8}}, cwd=tmp_path)
    assert found.inductor == {"max_autotune": True, "triton.cudagraphs": True, "post_grad_custom_post_pass": hook, "cpp.simdlen": 8}
    assert found.inductor_patches() == found.inductor


def test_a_method_may_not_be_named_like_a_setting():
    with pytest.raises(ConfigError, match="plan: a method may not be named like a setting"):
        config.load(method_models={"plan": Method}, cwd="/nonexistent", environ={})


def test_digest_follows_what_changes_the_result(tmp_path):
    plan = write(tmp_path, "one", "plan.json")
    base = {"passes": ["dense"], "plan": str(plan)}
    digest = load(base).digest()
    assert digest == load({**base, "trace": "/elsewhere"}).digest()
    assert digest == load(dict(reversed(base.items()))).digest()
    assert digest != load({**base, "exact": True}).digest()
    assert digest != load({**base, "xattention": {"stride": 16}}).digest()
    plan.write_text("two")
    assert digest != load(base).digest()


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().strict = True


TABLES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*config.SETTINGS, *MODELS, "config", "other"]), TABLES, max_size=4))
def test_any_options_give_a_config_or_a_config_error(options):
    try:
        found = load(options)
    except ConfigError:
        return
    found.for_layer("model.layers.3.self_attn", 3)
    assert len(found.digest()) == 64


def test_a_file_of_the_working_folder_is_mentioned_once(tmp_path, caplog):
    (tmp_path / "sparsify.toml").write_text('passes = ["sink_window"]\ntrace = "dumps"\n')
    for _ in range(3):
        config.load({}, method_models=MODELS, cwd=tmp_path, environ={})
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(tmp_path / "sparsify.toml") in record.getMessage()
    assert record.getMessage().endswith("sets passes, trace")


def test_files_that_somebody_asked_for_are_not_mentioned(tmp_path, caplog):
    (tmp_path / "asked.toml").write_text('passes = ["dense"]\n')
    config.load({"config": "asked.toml"}, method_models=MODELS, cwd=tmp_path, environ={})
    config.load({}, method_models=MODELS, cwd=tmp_path, environ={"SPARSIFY_CONFIG": "asked.toml"})
    assert caplog.records == []
