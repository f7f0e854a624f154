"""Which sums are read from peers: what a group of processes agrees on before it does so, and what graphs make of it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify.costs import links
from sparsify.costs.device import Device
from sparsify.costs.profile import Links
from sparsify.distributed import agreement, peers
from sparsify.distributed.peers import Peers
from sparsify.errors import DistributedError
from sparsify.rewriting import small_sums
from tests.support import processes, tensor_parallel
from tests.support.cache_reference import left_padded, text

GPU = torch.device("cuda", 0)


class Others:
    """The group's talk as rank 0 hears it: rank 1 says the same but where it is told otherwise. said: by number of the question."""

    def __init__(self, said: dict[int, object]):
        self.said, self.asked = said, 0

    def __call__(self, group, value, *, where):
        self.asked += 1
        return [value, self.said.get(self.asked - 1, value)]


@pytest.fixture
def steps(monkeypatch):
    """The steps that were taken, which all succeed but those of `failing`."""
    taken, failing = [], {}

    def step(name, result=None):
        def run(*args):
            assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
            taken.append(name)
            if name in failing:
                raise failing[name]
            return args[0] if result is None else result

        monkeypatch.setattr(peers, name, run)

    monkeypatch.setattr(peers, "_obstacle", lambda processes, device: "" if processes == 2 else "three")
    step("_reserve", torch.empty(4096, dtype=torch.uint8))
    step("_meet")
    step("_try")
    return taken, failing


ALL = ["_reserve", "_meet", "_try"]


@pytest.mark.parametrize(
    "said, failing, taken, obstacle",
    [
        ({}, {}, ALL, ""),
        ({0: 0}, {}, [], "not expected to be faster"),
        ({1: "elsewhere"}, {}, [], "rank 0: the processes are on several hosts"),
        ({2: "no memory"}, {}, ["_reserve"], "rank 1: no memory"),
        ({3: "no handle"}, {}, ["_reserve", "_meet"], "rank 1: no handle"),
        ({4: "a sum was wrong"}, {}, ALL, "rank 1: a sum was wrong"),
        ({}, {"_reserve": RuntimeError("CUDA driver error\nmore")}, ["_reserve"], "rank 0: RuntimeError: CUDA driver error"),
        ({}, {"_meet": OSError("no socket")}, ["_reserve", "_meet"], "rank 0: OSError: no socket"),
        ({}, {"_try": ValueError("sums of 2 parts were wrong")}, ALL, "rank 0: ValueError: sums of 2 parts were wrong"),
    ],
)
def test_what_one_process_cannot_do_none_does(steps, monkeypatch, said, failing, taken, obstacle):
    monkeypatch.setattr(agreement, "told", Others(said))
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    steps[1].update(failing)
    found = peers._tried("group", GPU, 4100)
    assert (found.obstacle, found.most) == (obstacle, 0 if obstacle else 4096)
    assert (found.buffer is None) is bool(obstacle)
    assert steps[0] == taken
    assert "TORCH_SYMM_MEM_DISABLE_MULTICAST" not in os.environ


def test_a_sum_that_hangs_is_an_error(steps, monkeypatch):
    monkeypatch.setattr(agreement, "told", Others({}))
    steps[1]["_try"] = DistributedError("a sum has not ended", where=peers.WHERE)
    with pytest.raises(DistributedError, match="has not ended"):
        peers._tried("group", GPU, 4096)


def test_a_group_is_asked_once_and_anew_when_its_name_is_anothers(monkeypatch):
    groups, asked = ["one"], []
    monkeypatch.setattr(peers, "_found", {})
    monkeypatch.setattr(peers, "process_group", lambda name: groups[-1])
    monkeypatch.setattr(peers, "_tried", lambda *given: asked.append(given) or Peers(64, torch.empty(64)))
    assert peers.of("0", GPU).most == 0
    first = peers.prepare("0", GPU, 64)
    assert peers.prepare("0", GPU, 64) is first is peers.of("0", GPU) and len(asked) == 1
    groups.append("two")
    assert peers.prepare("0", GPU, 64) is not first and len(asked) == 2
    assert peers.prepare("0", torch.device("cpu"), 64).obstacle == "" and len(asked) == 2


@pytest.mark.parametrize(
    "shape, dtype, takes",
    [
        ((1, 1, 2048), torch.bfloat16, True),
        ((1, 1, 2049), torch.bfloat16, False),  # more than there is room for
        ((1, 1, 1026), torch.bfloat16, False),  # no multiple of 16 bytes
        ((1, 1, 1024), torch.float32, True),
        ((1, 1, 1024), torch.float16, False),
    ],
)
def test_which_parts_are_taken(shape, dtype, takes):
    assert Peers(4096, torch.empty(4096)).takes(torch.empty(shape, dtype=dtype)) is takes
    assert not Peers().takes(torch.empty(shape, dtype=dtype))


def device(**numbers: float) -> Device:
    from sparsify.costs.profile import Profile

    links_of = Links(**{"exchange": 380e9, "reduce": 350e9, "latency": 16e-6, **numbers})
    profile = Profile.model_construct(links=links_of)
    return Device("cuda", "", (9, 0), 1e15, 1e12, 1e-6, profile=profile)


def test_bytes_up_to_which_peers_are_expected_to_be_faster():
    """7.8 µs less to begin with, then each byte is read from every other process at 105 GB/s at most."""
    assert links.peer_bytes(2, device()) == 1 << 20  # the most there is
    eight = links.peer_bytes(8, device())
    assert eight == pytest.approx(7.8e-6 / (7 / 105e9 - 1.75 / 350e9), rel=1e-3)
    assert links.peer_bytes(8, device(exchange=50e9)) < eight < links.peer_bytes(4, device())
    assert links.peer_bytes(2, device(latency=5e-6)) == 0
    # a token's sum takes the faster way, and only among as many processes as torch's kernel serves
    assert links.step_sum_seconds(8192, 8, device()) == pytest.approx(8.2e-6 + 8192 * 7 / 105e9)
    assert links.step_sum_seconds(2 * eight, 8, device()) == links.reduce_seconds(2 * eight, 8, device())
    assert links.step_sum_seconds(8192, 3, device()) == links.reduce_seconds(8192, 3, device())


def graph_of(*shapes: tuple[int, ...], op: str = "sum", dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A graph with a sum over processes of each input, as Dynamo captures them."""
    graph, mode = fx.Graph(), FakeTensorMode()
    results = []
    for number, shape in enumerate(shapes):
        node = graph.placeholder(f"x{number}")
        node.meta["example_value"] = mode.from_tensor(torch.empty(shape, dtype=dtype))
        for target, more in ((torch.ops._c10d_functional.all_reduce, (op, "group")), (torch.ops._c10d_functional.wait_tensor, ())):
            value = node.meta["example_value"]
            node = graph.call_function(target.default, (node, *more))
            with mode:
                node.meta["example_value"] = torch.empty_like(value)
        results.append(node)
    graph.output(tuple(results))
    return fx.GraphModule({}, graph)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(peers, "_found", {("group", torch.device("cpu")): (None, Peers(4096, torch.empty(4096)))})
    monkeypatch.setattr(small_sums, "process_group", lambda name: type("Two", (), {"size": lambda self: 2})())


@pytest.mark.parametrize(
    "how, replaced",
    [
        ({"shapes": [(1, 1, 64), (2, 1, 512), (1, 4, 256)]}, 3),
        ({"shapes": [(1, 1, 64), (1, 300, 64), (64,)]}, 1),  # a prompt's rows, and something else
        ({"shapes": [(1, 1, 64)], "op": "max"}, 0),
        ({"shapes": [(1, 1, 64)], "dtype": torch.float64}, 0),
    ],
)
def test_sums_of_a_graph(known, how, replaced):
    gm = graph_of(*how.pop("shapes"), **how)
    before = len(list(gm.graph.nodes))
    assert small_sums.replace(gm) == replaced
    names = [str(node.target) for node in gm.graph.nodes]
    assert names.count("sparsify.small_sum.default") == replaced
    assert len(names) == before - replaced  # one call in the place of two


def test_what_plans_say_of_sums(known, monkeypatch):
    tell = lambda *shapes, allowed=True, **how: small_sums.told(graph_of(*shapes, **how).graph, allowed)
    assert tell((1, 1, 64), (1, 1, 64)) == "2 sums of 2 processes, read from peers up to 4.1 kB"
    assert tell((1, 1, 64), allowed=False) == "1 sum of 2 processes, through NCCL, as asked for"
    assert tell((1, 1, 64), dtype=torch.float16) == "1 sum of 2 processes, through NCCL (float16)"
    assert tell((1, 300, 64)) == "1 sum of 2 processes, through NCCL: more than the 4.1 kB that are read from peers"
    assert tell((64,)) == "1 sum of 2 processes, through NCCL; those of tokens are read from peers up to 4.1 kB"
    monkeypatch.setattr(peers, "_found", {})
    assert tell((1, 1, 64)) == ""  # on a CPU there is nothing to choose


CASES = {
    "dense": (text(2, 40), None, {"passes": ["dense"]}, None),
    "padded": (text(2, 200), left_padded([200, 139]), {"passes": ["xattention"], "xattention": {"block": 64, "threshold": 0.5}}, None),
    "asked for": (text(2, 40), None, {"passes": ["dense"], "peer_sums": False}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("count, overrides", [(2, {}), (4, {"num_key_value_heads": 4})])
def test_a_tokens_sums_are_read_from_peers(count, overrides):
    """Two a layer and token, of the eleven that follow the first; a prompt's are larger, and go through the group."""
    want = tensor_parallel.all_of("tokens", "llama", CASES, False, overrides)
    most = 2 * 4 * 64  # two rows of a token
    for found in processes.run(count, tensor_parallel.sums_of_peers, "llama", CASES, most, overrides):
        for name, (result, read, told) in found.items():
            assert torch.equal(result, want[name][0]), name
            assert read == (0 if name == "asked for" else 11 * 2 * 2), name
            assert any("read from peers up to" in one for one in told) is (name != "asked for"), told
