import json

import pytest

from sparsify.commands.eval import command, settings
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.planning.plan import Plan


def test_short_forms():
    assert settings.parse("default").options == {} and settings.parse("eager").options is None
    assert settings.parse("dense").options == {"exact": True}
    assert settings.parse("tau=0.9") == settings.Setting("τ 0.9", {"min_length": 0, "xattention": {"threshold": 0.9}})
    assert settings.parse("density=.1").options["xattention"] == {"density": 0.1}


def test_options_in_place():
    found = settings.parse('row τ .8:min_length=0,xattention.pool=row,xattention.estimate=["half", "int8"],passes=["xattention", "dense"]')
    assert found.name == "row τ .8"
    assert found.options == {
        "min_length": 0,
        "xattention": {"pool": "row", "estimate": ["half", "int8"]},
        "passes": ["xattention", "dense"],
    }


def test_files(tmp_path):
    (tmp_path / "options.json").write_text('{"xattention": {"stride": 4}}')
    (tmp_path / "sparsify.toml").write_text("exact = true\n")
    Plan([]).save(tmp_path / "plan.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "nothing.json").write_text("{")
    assert settings.parse(f"fine={tmp_path}/options.json").options == {"xattention": {"stride": 4}}
    assert settings.parse(f"own={tmp_path}/sparsify.toml").options == {"config": f"{tmp_path}/sparsify.toml"}
    assert settings.parse(f"mine={tmp_path}/plan.json").options == {"plan": f"{tmp_path}/plan.json"}
    for name, message in [("list", "must be a table"), ("nothing", "neither JSON nor TOML"), ("absent", "cannot be read")]:
        with pytest.raises(ConfigError, match=message):
            settings.parse(f"x={tmp_path}/{name}.json")


@pytest.mark.parametrize("text", ["", "fast", "tau=much", "=a.json", "dense=a.json"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(ConfigError, match=r"is no (setting|number)"):
        settings.parse(text)


def test_caches_come_with_the_question_inside_and_outside():
    inside, outside = settings.parse_cache("snapkv:0.25:kernel=15")
    assert inside.cache == settings.CacheSetting("snapkv", 0.25, (("kernel", 15),), "inside") and outside.cache.question == "outside"
    assert inside.options == {"exact": True} and inside.cache.tokens(1001) == 251
    assert settings.parse_cache("streaming_llm:4K")[0].cache.tokens(10) == 4096
    for text in ("snapkv", "snapkv:", "snapkv:0", ":512", "snapkv:2.5"):
        with pytest.raises(ConfigError, match="is no cache"):
            settings.parse_cache(text)


def test_dense_is_always_first_and_names_are_unique():
    assert [one.name for one in settings.all_of(["tau=0.9", "dense"], [])] == ["dense", "τ 0.9"]
    assert [one.name for one in settings.all_of([], [])] == ["dense", "default"]
    with pytest.raises(ConfigError, match="named twice"):
        settings.all_of(["tau=0.9", "tau=.9"], [])


def test_a_settings_options_go_over_those_for_all():
    common = {"lower": "eager", "xattention": {"stride": 16, "threshold": 0.5}}
    found = settings.merged(common, settings.parse("tau=0.9"))
    assert found["xattention"] == {"stride": 16, "threshold": 0.9} and found["lower"] == "eager" and found["progress"] is False
    assert common["xattention"]["threshold"] == 0.5
    with pytest.raises(ConfigError, match="has its own"):
        settings.merged({"config": "a.toml"}, settings.Setting("x", {"config": "b.toml"}))


def test_settings_are_written_as_json():
    for one in settings.all_of(["eager", "tau=0.9"], ["snapkv:512"]):
        assert json.loads(json.dumps(one.data()))["name"] == one.name


def test_lengths_and_tasks():
    assert command.parse_lengths("8K,2K,4096") == [2048, 4096, 8192]
    for text in ("", "4K..8K", "0", "x"):
        with pytest.raises(ConfigError, match="no list of lengths"):
            command.parse_lengths(text)
    names, forms = command.split_tasks("ruler,gsm8k,needles_json")
    assert names == [*command.RULER, "gsm8k"] and forms == ["json"]
    assert "hash" in command.split_tasks("needles")[1]
    with pytest.raises(ConfigError, match="unknown form"):
        command.split_tasks("needles_jsn")


def test_which_tasks_a_model_can_be_asked(monkeypatch):
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        command._check_tasks(["ruler_vt"], [], False, None)
    with pytest.raises(UnsupportedError, match="tokens are bytes"):
        command._check_tasks([], ["hash"], True, "text")
    with pytest.raises(ConfigError, match="need a text"):
        command._check_tasks([], ["hash"], False, None)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"sparsify-compiler\[eval\]"):
        command._check_tasks(["ruler_vt"], [], True, None)
