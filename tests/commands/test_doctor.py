"""`sparsify doctor`: what is found, and that what it tells to do is what mends it."""

from __future__ import annotations

import argparse
import json
from collections import namedtuple

import pytest
import torch

from sparsify import releases
from sparsify.commands import doctor
from sparsify.commands import main as cli
from sparsify.costs import device as hardware
from sparsify.graph import compat

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No configuration and no cache folder from outside, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSIFY_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware.forget()
    yield
    hardware.forget()


def test_every_check_is_a_line_and_the_exit_code_says_whether_one_fails(capsys, monkeypatch):
    monkeypatch.setattr(compat, "cpp_obstacle", lambda: None)
    code = cli.main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in data["checks"]]
    assert names[:3] == list(releases.TESTED) and {"gpu", "cache folder", "configuration", "costs on cpu", "kernels on cpu"} <= set(names)
    failed = [check for check in data["checks"] if check["status"] == "fail"]
    assert (code, data["ok"]) == ((1, False) if failed else (0, True))
    assert all(check["remedy"] for check in failed)
    monkeypatch.setattr(compat, "cpp_obstacle", lambda: "no C++ compiler")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "c++ compiler" in line] == ["fail"] and "g++" in out


@pytest.mark.parametrize(
    ("version", "status", "remedy"),
    [
        (None, "warn", 'pip install "sparsify-compiler[hf]"'),
        ("5.16.3", "fail", 'pip install "transformers>=5.17"'),
        ("5.17.0", "ok", ""),
        ("99.0", "warn", f'pip install "transformers=={releases.TESTED["transformers"][1]}"'),
    ],
)
def test_releases_are_held_against_what_is_promised(monkeypatch, version, status, remedy):
    monkeypatch.setattr(releases, "installed", lambda name: version)
    found = doctor.package("transformers")
    assert (found.status, found.remedy) == (status, remedy)


def test_a_cache_folder_that_others_can_write_is_told(tmp_path, monkeypatch):
    assert doctor.cache_folder() == doctor.Check("cache folder", "ok", str(tmp_path / "cache"))
    (tmp_path / "cache").chmod(0o777)
    found = doctor.cache_folder()
    assert (found.status, found.remedy) == ("fail", f"chmod 700 {tmp_path / 'cache'}")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("")
    assert doctor.cache_folder().status == "fail"
    # what would be measured could not be kept: the folder is what has to be mended
    assert doctor.profile(CPU).remedy == doctor.cache_folder().remedy and "SPARSIFY_CACHE_DIR" in doctor.profile(CPU).remedy
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache" / "deeper"))
    assert doctor.cache_folder().found.endswith(f"{tmp_path / 'cache'} is a file")


def test_a_configuration_that_cannot_be_read_is_told(tmp_path):
    given = argparse.Namespace(option=[], config=None)
    assert doctor.configuration(given).status == "ok"
    (tmp_path / "sparsify.toml").write_text("pases = []")
    found = doctor.configuration(given)
    assert found.status == "fail" and "pases" in found.found


def test_costs_are_estimates_until_they_are_measured():
    found = doctor.profile(CPU)
    assert (found.status, found.remedy) == ("warn", "sparsify calibrate device --device cpu")


Properties = namedtuple("Properties", "name total_memory major minor")


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((8, 0), "ok"), ((7, 5), "warn")])
def test_gpus_are_told_by_their_compute_capability(monkeypatch, capability, status):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties("GPU", 80 << 30, *capability))
    found = doctor.gpu(torch.device("cuda", 0))
    assert found.status == status and "80 GiB" in found.found and f"{capability[0]}.{capability[1]}" in found.found


def test_a_trial_that_fails_or_differs_is_told():
    assert doctor._attempt(lambda: 1e-4)[0] == "ok"
    assert doctor._attempt(lambda: 0.5)[0] == doctor._attempt(lambda: float("nan"))[0] == "fail"
    assert doctor._attempt(lambda: 1 // 0)[:2] == ("fail", "ZeroDivisionError: integer division or modulo by zero")


@pytest.mark.slow
def test_a_trial_compiles_and_compares():
    assert doctor.trial(CPU).status == "ok"
