import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.commands import arguments
from sparsify.commands import main as cli
from sparsify.planning import registry
from sparsify.planning.config import docs

ROOT = Path(__file__).parents[2]
SINK_WINDOW = ["-o", "lower=eager", "-o", "min_length=0"]
# harmless windows everywhere, one harmful window at layer 2
BAD_LAYER = [
    *SINK_WINDOW,
    "-o",
    'rules=[{layers="*", method="sink_window", window=9999}, {layers="2", method="sink_window", window=1, sinks=0}]',
]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No configuration from outside; every file lands in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("SPARSIFY_CONFIG", "SPARSIFY_TRACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    folder = tmp_path_factory.mktemp("models") / "llama"
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape, **heads)).save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_config_prints_what_is_in_effect_as_a_file_that_gives_it_again(capsys, tmp_path, monkeypatch):
    (tmp_path / "sparsify.toml").write_text("exact = true\n[xattention]\nthreshold = [0.5, 0.9]\n[inductor.triton]\ncudagraphs = true\n")
    (tmp_path / "other.toml").write_text('[[rules]]\nlayers = "0-3"\nmethod = ["sink_window", "dense"]\nwindow = 7\n')
    code, first, _ = run(capsys, "config", "--config", "other.toml", "-o", "xattention.stride=16", "-o", "trace=dumps and more")
    assert code == 0
    assert "exact = true" in first and "stride = 16" in first and "threshold = [0.5, 0.9]" in first and "{window = 7}" in first
    (tmp_path / "sparsify.toml").unlink()
    (tmp_path / "again.toml").write_text(first)
    monkeypatch.setenv("SPARSIFY_CONFIG", "again.toml")
    assert run(capsys, "config", "--show") == (0, first, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "xattention.strid=8"], "sparsify: options: xattention.strid: unknown key (did you mean 'stride'?)\n"),
        (["-o", "passes=dense"], "sparsify: options: passes: must be a list, not 'dense'\n"),
        (["-o", "passes"], "sparsify: -o passes: is not KEY=VALUE (for example -o xattention.stride=16)\n"),
        (["-o", "strict=true", "-o", "strict.x=1"], "sparsify: -o strict.x=1: 'strict' has a value already\n"),
        (["--config", "absent.toml"], "sparsify: absent.toml: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, arguments, message):
    code, out, err = run(capsys, "config", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="unknown key"):
        cli.main(["config", "--debug", "-o", "pases=[]"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["explain"],
        ["explain", "m", "--length", "0"],
        ["explain", "m", "--length", "4Q"],
        ["explain", "m", "--prompt", "a", "--length", "3"],
    ],
)
def test_wrong_usage_exits_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: sparsify" in capsys.readouterr().err


def test_methods_lists_every_method(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    for name in registry.discover():
        assert f"│ {name} " in out
    assert "sinks = 4: integer" in out


def test_listings_are_json_too(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == registry.discover().keys()
    assert found["xattention"]["result"] == "lossy" and found["xattention"]["options"]["properties"]["stride"]["default"] == 8
    code, out, _ = run(capsys, "config", "--json", "-o", "xattention.stride=16")
    assert code == 0 and json.loads(out)["xattention"]["stride"] == 16


def test_completions_are_printed_where_shtab_is_installed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--print-completion", "bash"])
    assert caught.value.code == 2 and "sparsify-compiler[completion]" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "shtab")
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--print-completion", "bash"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "doctor" in out and "--print-completion" in out and "_shtab_sparsify_explain___html_COMPGEN=_shtab_compgen_files" in out


def test_fish_needs_no_package(capsys, monkeypatch):
    """What `complete -C "sparsify "` offers in fish is what these lines say: checked by fish itself where it is installed."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--print-completion", "fish"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(line.startswith("complete -c sparsify ") for line in out.splitlines())
    assert any("-a explain -d" in line and "not __fish_seen_subcommand_from explain" in line for line in out.splitlines())
    (html,) = (line for line in out.splitlines() if "-l html " in line)
    assert "'__fish_seen_subcommand_from explain'" in html and "-r -F" in html
    if (fish := shutil.which("fish")) is None:
        return

    def offered(words):
        asked = f"{out}\ncomplete -C '{words}'"
        lines = subprocess.run(
            [fish, "--no-config"], input=asked, capture_output=True, text=True, check=True, timeout=60
        ).stdout.splitlines()
        return {line.split("\t")[0] for line in lines}

    assert {"explain", "doctor", "calibrate"} <= offered("sparsify ")
    assert {"--html", "--json"} <= offered("sparsify explain --") and "--html" not in offered("sparsify doctor --")
    assert "device" in offered("sparsify calibrate ") and "device" not in offered("sparsify calibrate device ")
    assert offered("sparsify calibrate device --device ") == {"cuda", "cpu"}


@pytest.mark.parametrize(("error", "code", "told"), [(BrokenPipeError, 0, ""), (KeyboardInterrupt, 130, "sparsify: interrupted")])
def test_readers_that_go_and_interruptions_are_no_failures(error, code, told):
    thrown = f"doctor.examine = lambda given: (_ for _ in ()).throw({error.__name__}())"
    program = f"import sys; from sparsify.commands import doctor, main; {thrown}; sys.exit(main.main(['doctor']))"
    here = Path(cli.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert [line for line in ended.stderr.splitlines() if " is newer than " not in line] == told.splitlines()


def test_the_command_line_page_names_every_command():
    page = (ROOT / "docs" / "command-line.md").read_text()
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {name for name in commands.choices if f"`sparsify {name}" not in page} == set()


def test_the_configuration_reference_is_current(capsys):
    code, out, _ = run(capsys, "config", "--markdown")
    assert code == 0
    hint = "python -m sparsify.commands.main config --markdown > docs/configuration.md"
    assert out == (ROOT / "docs" / "configuration.md").read_text(), f"run: {hint}"
    assert hint in out


def test_every_option_has_a_description():
    for name, model in registry.discover().items():
        for key, info in model.model_fields.items():
            assert info.description, f"{name}.{key}"
    assert "| `block` | `64`, `128` | `128` |" in docs.markdown(registry.discover())


def test_explain_lists_every_site_and_saves_the_plan(capsys, model_folder, tmp_path):
    code, out, _ = run(
        capsys,
        "explain",
        model_folder,
        "--length",
        300,
        *SINK_WINDOW,
        "-o",
        "passes=['sink_window']",
        "--save",
        "plan.json",
        "--html",
        "plan.html",
    )
    assert code == 0, out
    page = (tmp_path / "plan.html").read_text()
    assert f"<h1>{model_folder}</h1>" in page and page.count('data-state="rewritten"') == 4
    assert "4 of 4 attention sites rewritten" in out
    decisions = json.loads((tmp_path / "plan.json").read_text())["decisions"]
    assert [d["method"] for d in decisions] == ["sink_window"] * 4
    assert [d["layer"] for d in decisions] == [0, 1, 2, 3]


def test_explain_reads_bytes_where_there_is_no_tokenizer(capsys, model_folder, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(bytes(range(256)))
    code, out, _ = run(capsys, "explain", model_folder, "--prompt", "prompt.txt", "--max-tokens", 200, "-o", "passes=['dense']", "--json")
    assert code == 0
    assert {d["sizes"]["key_len"] for d in json.loads(out)["decisions"]} == {"200"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no/such/folder/at-all"], "sparsify: no/such/folder/at-all: cannot load the model: there is no such folder\n"),
        (["explain", "/nonexistent"], "sparsify: /nonexistent: cannot load the model: there is no such folder\n"),
        (["cost", "/nonexistent"], "sparsify: /nonexistent: cannot load the model: there is no such folder\n"),
        (["calibrate", "ffn", "./no", "--text", "empty.txt"], "sparsify: ./no: cannot load the model: there is no such folder\n"),
        (["explain", "."], "sparsify: .: cannot load the model: the folder has no config.json\n"),
        (["explain", "empty.txt"], "sparsify: empty.txt: cannot load the model: it is a file: name its folder\n"),
        (["explain", "no-such-model"], "sparsify: no-such-model: cannot load the model: "),
        (["explain", "MODEL", "--length", "4K"], "sparsify: MODEL: 4096 tokens are more than the model's 1024 positions (--length 1024)\n"),
        (["diff", "MODEL", "--prompt", "long.txt"], "sparsify: MODEL: 2000 tokens are more than the model's 1024 positions (--max-tokens"),
        (
            ["calibrate", "errors", "MODEL", "--text", "long.txt", "--chunk", "2k"],
            "sparsify: MODEL: 2000 tokens are more than the model's 1024 positions (--chunk 1024)\n",
        ),
        (["explain", "MODEL", "--device", "cuda"], "sparsify: --device: cannot use device 'cuda': there is no CUDA device here"),
        (["explain", "MODEL", "--device", "cuda:7"], "sparsify: --device: cannot use device 'cuda:7': there is no CUDA device here"),
        (["calibrate", "device", "--device", "cuda"], "sparsify: --device: cannot use device 'cuda': there is no CUDA device here"),
        (["diff", "MODEL", "--prompt", "absent.txt"], "sparsify: absent.txt: cannot be read: No such file or directory\n"),
        (["diff", "MODEL", "--prompt", "empty.txt"], "sparsify: empty.txt: the prompt has no tokens\n"),
        (["diff", "MODEL", "--tolerance", "-1"], "sparsify: --tolerance: must be at least 0, not -1.0\n"),
        (["explain", "MODEL", "--device", "nonsense"], "sparsify: --device: cannot use device 'nonsense': "),
    ],
)
def test_models_and_prompts_that_cannot_be_used(capsys, model_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_bytes(b"a" * 2000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where there is no network, a minute of attempts
    code, out, err = run(capsys, *[model_folder if argument == "MODEL" else argument for argument in arguments])
    assert (code, out) == (2, "")
    assert err.startswith(message.replace("MODEL", model_folder)) and err.count("\n") == 1


def test_lengths_have_suffixes():
    assert [arguments.tokens(text) for text in ("7", "4K", "4k", "1M", " 32 ")] == [7, 4096, 4096, 1 << 20, 32]
    assert arguments.tokens_or_none("0") == 0
    for text in ("0", "", "K", "4KB", "-4", "1.5K", "1e3", "٤"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of tokens"):
            arguments.tokens(text)


def test_a_model_of_few_positions_is_explained_with_as_many_tokens(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "model")
    code, out, _ = run(capsys, "explain", tmp_path / "model", "--device", "cpu")
    assert code == 0 and "32×32" in out and "costs on cpu" in out


def test_versions_are_those_of_what_matters(capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.count("\n") == 1
    assert [piece.split()[0] for piece in out.split(", ")] == ["sparsify", "torch", "triton", "transformers"]
    assert f"sparsify {sparsify.__version__}, torch {importlib.metadata.version('torch')}, " in out

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "triton not installed" in arguments.versions()


def test_diff_exits_0_when_nothing_differs(capsys, model_folder, tmp_path):
    code, out, _ = run(capsys, "diff", model_folder, "--length", 200, "-o", "lower=eager", "-o", "passes=['dense']")
    assert code == 0, out
    assert out.startswith("everything: same") and "4 of 4 sites rewritten" in out
    assert not (tmp_path / "sparsify_repro.py").exists()


@pytest.mark.slow
def test_diff_names_the_bad_site_and_its_repro_script_reproduces_it(capsys, model_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("a prompt of some length, " * 10)
    code, out, _ = run(capsys, "diff", model_folder, "--prompt", "prompt.txt", *BAD_LAYER)
    assert code == 1, out
    assert "first to leave the tolerance: sink_window at model.layers.2.self_attn\n" in out
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sparsify_repro.py"], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("DIFFERS") and "1 of 4 sites rewritten" in done.stdout


def test_diff_with_keep_all_forgives_what_is_only_lossy(capsys, model_folder):
    code, out, _ = run(capsys, "diff", model_folder, "--length", 200, *BAD_LAYER, "--keep-all", "--json")
    assert code == 0, out
    found = json.loads(out)
    assert [(one["step"], one["close"], one["rewritten"]) for one in found["steps"]] == [("everything", True, 4)]
    assert found["culprit"] is None and found["steps"][0]["kept"] == 4


def test_diff_with_keep_all_runs_the_defaults_at_any_length(capsys, model_folder):
    code, out, _ = run(capsys, "diff", model_folder, "--length", 80, "-o", "lower=eager", "-o", "strict=true", "--keep-all")
    assert code == 0 and "4 by a lossy method with everything kept, density 100.0%" in out
    code, out, _ = run(capsys, "diff", model_folder, "--length", 80, "-o", "lower=eager", "-o", 'passes=["dense"]', "--keep-all")
    assert code == 0 and "\nNOTHING WAS SHOWN" in out


def test_the_command_runs_as_a_module(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sparsify.commands.main", "config", "-o", "mode=fastest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("sparsify: options: mode: there is no mode 'fastest'")
