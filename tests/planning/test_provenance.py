"""What a plan file says of its making survives the file, lists of numbers take one line, and a plan for another model is refused."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch.nn import DataParallel

import sparsify
from sparsify.errors import PlanError
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import Calibration, Provenance, Weight, check_model, provenance_of, unwrapped
from sparsify.testing import compare, compare_tokens

pytest.importorskip("transformers")

from tests.support.tiny_models import build

MADE = Calibration(
    text="t", settings="s", lengths=[256, 512], pieces=[1, 2], seed=3, budget={"density": 0.1}, at=512, target="H200",
    seconds=1e-3, dense_seconds=2e-3, density=0.1, errors={"256": 0.01, "512": 0.02}, gap=0.0,
)  # fmt: skip
FOR = Provenance(
    "llama", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, {"norm.weight": Weight([4], [1.0, 0.5, 2.0, 1.0])}
)


def test_a_round_trip():
    plan = Plan(min_length=4096, provenance=FOR, calibration=MADE)
    assert Plan.from_json(plan.to_json()) == plan
    assert '  "lengths": [256, 512],' in plan.to_json().splitlines()
    assert '    "numbers": [1.0, 0.5, 2.0, 1.0]' in plan.to_json().splitlines()
    assert Plan.from_json(Plan().to_json()) == Plan()
    assert {"torch", "sparsify", "transformers", "ops"} >= Plan().versions.keys() >= {"torch", "transformers", "ops"}


OLD = """{
 "format": 1, "decisions": [], "versions": {"torch": "2.11.0", "ops": "1"}, "fallback": "", "device": "", "capture": "", "serves": 0,
 "min_length": 4096,
 "provenance": {
  "model": "m", "model_type": "llama", "text": "t", "settings": "s", "lengths": [256, 512], "pieces": [1, 2], "seed": 3,
  "budget": {"density": 0.1}, "at": 512, "target": "H200", "seconds": 1e-3, "dense_seconds": 2e-3, "density": 0.1,
  "errors": {"256": 0.01, "512": 0.02}, "gap": 0.0, "versions": {"torch": "2"}, "last": 16, "losses": {"512": 0.03}, "lost": 0.02
 },
 "beside": {}
}"""


def test_one_that_was_calibrated_before_plans_named_their_model_is_read():
    plan = Plan.from_json(OLD)
    assert plan.provenance == Provenance("llama") and plan.min_length == 4096
    assert plan.calibration == dataclasses.replace(MADE, last=16, losses={"512": 0.03}, lost=0.02)
    assert Plan.from_json(plan.to_json()) == plan
    first = OLD.replace(', "last": 16, "losses": {"512": 0.03}, "lost": 0.02', "")  # as the first ones were
    assert first != OLD and Plan.from_json(first).calibration == MADE


@pytest.mark.parametrize("wrong", ['"seed": "3"', '"seed": 3, "more": 1'])
@pytest.mark.parametrize("text", [Plan(calibration=MADE).to_json(), OLD], ids=["now", "before"])
def test_it_is_read_as_strictly_as_the_rest(text, wrong):
    with pytest.raises(PlanError, match="not a plan file"):
        Plan.from_json(text.replace('"seed": 3', wrong))
    assert dataclasses.asdict(MADE)["seed"] == 3


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def other_weights(model, seed=7):
    torch.manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.uniform_(0.8, 1.2)
    return changed


@torch.no_grad()
def test_every_plan_names_its_model(llama, tmp_path):
    ids = torch.randint(3, 100, (1, 20))
    plan = sparsify.explain(llama, input_ids=ids, use_cache=False, options={"passes": ["dense"]})
    assert plan.provenance.model_type == "llama" and plan.provenance.structure["num_hidden_layers"] == 2
    assert not plan.provenance.weights  # no weight decides what is expected to pay
    plan.save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json"), "lower": "eager"}
    found = compare(other_weights(llama), {"input_ids": ids, "use_cache": False}, options={**options, "strict": True})
    assert found.rewritten == 2 and found.plan.provenance == plan.provenance
    for other, what in (
        (build("llama", layers=1), "this llama has num_hidden_layers = 1, not 2"),
        (build("qwen2", layers=2), "the plan was made for another model: for a llama, and this is a qwen2"),
    ):
        with pytest.raises(PlanError, match=what):
            sparsify.compile(other, **options)
        with pytest.raises(PlanError, match=what):
            sparsify.explain(other, input_ids=ids, options=options)
        with pytest.raises(PlanError, match=what):
            compare(other, ids, options=options)


@torch.no_grad()
def test_a_calibrated_plan_that_was_followed_says_again_what_was_measured(llama, tmp_path):
    ids, options = torch.randint(3, 100, (1, 20)), {"plan": str(tmp_path / "plan.json"), "lower": "eager"}
    plan = sparsify.explain(llama, input_ids=ids, use_cache=False, options={"passes": ["dense"]})
    plan.provenance, plan.calibration = provenance_of(llama, measured=True), MADE
    plan.save(tmp_path / "plan.json")
    rounded = copy.deepcopy(llama).to(torch.bfloat16)  # near enough, with other numbers
    assert provenance_of(rounded, measured=True) != plan.provenance
    for again in (
        sparsify.explain(rounded, input_ids=ids, use_cache=False, options=options),
        compare(rounded, {"input_ids": ids, "use_cache": False}, options=options).plan,
        compare_tokens(rounded, ids, options=options, max_new_tokens=2).plan,
    ):
        assert (again.provenance, again.calibration) == (plan.provenance, MADE)
    kept = compare(rounded, {"input_ids": ids, "use_cache": False}, options=options, keep_all=True).plan  # other options decide
    assert not kept.provenance.weights and kept.calibration is None


def warnings_of(found, model, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparsify"):
        check_model(found, model, "plan.json")
    return [record.message for record in caplog.records]


def test_weights_count_where_they_were_measured_with(llama, caplog):
    measured, chosen = provenance_of(llama, measured=True), provenance_of(llama)
    assert 0 < len(measured.weights) <= 32 and all(len(one.numbers) <= 16 for one in measured.weights.values())
    for same in (llama, *(copy.deepcopy(llama).to(dtype) for dtype in (torch.bfloat16, torch.float16))):
        assert not warnings_of(measured, same, caplog)
    assert not warnings_of(provenance_of(copy.deepcopy(llama).to(torch.bfloat16), measured=True), llama, caplog)
    with pytest.raises(PlanError, match=r"calibrated on another model: on a llama, and this llama has other weights .*sparsify calibrate"):
        check_model(measured, other_weights(llama), "plan.json")
    assert not warnings_of(chosen, other_weights(llama), caplog)
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(PlanError, match="other weights"):
        check_model(measured, broken, "plan.json")
    further = copy.deepcopy(llama)
    with torch.no_grad():
        for weight in further.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    (message,) = warnings_of(measured, further, caplog)
    assert message.startswith("plan.json: the plan was calibrated on weights that differ by 0.0")


@pytest.mark.parametrize("name", ["bias", "lora_B"])
def test_weights_that_begin_as_zeros_say_nothing(name, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(30)))
    for layer in model:
        setattr(layer, name, nn.Parameter(torch.zeros(64)))
    found = provenance_of(model, measured=True)
    assert len(found.weights) == 30 and all(known.endswith(".weight") for known in found.weights)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for layer in trained:
            getattr(layer, name).normal_(0, 0.01)
    found.weights |= {f"{i}.{name}": Weight([64], [0.0] * 16) for i in range(30)}  # as plans held them
    assert not warnings_of(found, trained, caplog)
    with torch.no_grad():
        trained[3].weight.normal_(0, 1)
    with pytest.raises(PlanError, match="other weights"):
        check_model(found, trained, "plan.json")


@pytest.mark.parametrize(
    "wrap", [DataParallel, torch.compile, lambda m: torch.compile(DataParallel(m)), lambda m: DataParallel(torch.compile(m))]
)
def test_what_wraps_a_model_is_the_same_model(llama, wrap, caplog):
    found = provenance_of(llama, measured=True)
    assert unwrapped(wrap(llama)) is llama and unwrapped(llama) is llama and unwrapped(None) is None
    assert provenance_of(wrap(llama), measured=True) == found
    assert not warnings_of(found, wrap(llama), caplog)
    with pytest.raises(PlanError, match="this llama has other weights"):
        check_model(found, wrap(other_weights(llama)), "plan.json")


def in_codes(model, dtype):
    """As quantisers leave a model: linear layers hold codes of another shape or dtype, all else is as it was."""
    coded = copy.deepcopy(model)
    coded.config.quantization_config = {"quant_method": "made up", "bits": 4}
    for name, module in coded.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            codes = torch.zeros(module.weight.shape) if dtype.is_floating_point else torch.zeros(module.weight.numel() // 2, 1)
            module.weight = nn.Parameter(codes.to(dtype), requires_grad=False)
    return coded


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_as_codes_are_the_same_model(llama, dtype, caplog):
    assert not warnings_of(provenance_of(llama, measured=True), in_codes(llama, dtype), caplog)
    assert not warnings_of(provenance_of(in_codes(llama, dtype), measured=True), llama, caplog)
    with pytest.raises(PlanError, match="this llama has other weights"):
        check_model(provenance_of(llama, measured=True), in_codes(other_weights(llama), dtype), "plan.json")


def test_weights_of_four_bits_that_became_numbers_again_are_warned_of(llama, caplog):
    rounded = copy.deepcopy(llama)
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.dim() > 1:
                groups = weight.view(-1, 32)
                scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-6) / 7
                weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).view(weight.shape))
    assert len(warnings_of(provenance_of(llama, measured=True), rounded, caplog)) == 1


def test_what_another_release_knows_more_of_a_configuration_says_nothing(llama, caplog):
    found = provenance_of(llama)
    found.structure |= {"some_new_number": 3}
    del found.structure["hidden_size"]
    assert not warnings_of(found, llama, caplog)
    check_model(None, llama, "plan.json")


def test_modules_without_a_configuration(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    found = provenance_of(model, measured=True)
    assert found.model_type == "Sequential" and not found.structure
    assert not warnings_of(found, copy.deepcopy(model), caplog)
    with pytest.raises(PlanError, match="other weights"):
        check_model(found, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "plan.json")


def test_parts_of_a_model_count():
    model = nn.Linear(2, 2)
    model.config = type("Configuration", (), {"model_type": "pair", "to_dict": dict, "sub_configs": {"vision_config": None}})()
    model.config.num_hidden_layers, model.config.vision_config = 4, type("Vision", (), {"num_hidden_layers": 3, "hidden_size": 8})()
    assert provenance_of(model).structure == {"num_hidden_layers": 4, "vision_config.num_hidden_layers": 3, "vision_config.hidden_size": 8}
