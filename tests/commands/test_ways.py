"""GPUs that share a model: what each way of sharing is forecast to take, what travels, and which is chosen."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from sparsify.commands import main as cli
from sparsify.commands.cost import device as forecast_device
from sparsify.commands.cost import exchanged, forecaster, meta_model, ways
from sparsify.commands.cost.exchanged import Attended
from sparsify.costs import links
from sparsify.costs.links import ALONE, Sharing
from sparsify.costs.sizes import AttentionSizes
from sparsify.ops.estimate import DEFAULT
from sparsify.planning import registry
from sparsify.planning.config import config

H200 = forecast_device.named("h200")
SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16",
}  # fmt: skip
LENGTH = 1 << 19


@pytest.fixture(scope="module")
def asked():
    from transformers import LlamaConfig

    chosen = config.load(
        {"passes": ["xattention", "dense"], "xattention": {"density": 0.05}},
        method_models=registry.discover(),
        environ={},
        cwd="/nonexistent",
    )
    model = meta_model.build("8b", config=LlamaConfig(**SHAPE))
    return forecaster.Forecaster(model, chosen, forecast_device.context(H200, chosen))


def test_ways_are_those_that_heads_allow():
    assert [str(one) for one in links.ways(4, 8)] == ["TP 4", "TP 2 × CP 2", "CP 4"]
    assert [one.tp for one in links.ways(8, 2)] == [2, 1]
    assert [one.tp for one in links.ways(6, 8)] == [2, 1]


def test_two_gpus_take_about_half(asked):
    found = ways.compare(asked, [LENGTH], 2, 256, 141e9)
    assert found.sharings == (ALONE, Sharing(2, 1), Sharing(1, 2))
    one, heads, prompt = (found.side(way, 0) for way in range(3))
    assert one.prefill.exchange == one.decode.exchange == 0 and not one.sent
    for side in (heads, prompt):
        assert 1.7 < one.prefill.total / side.prefill.total < 2
        assert one.decode.total / 2 < side.decode.total < one.decode.total
        assert side.prefill.attention == pytest.approx(one.prefill.attention / 2, rel=0.01)
    # sums are waited for, blocks travel behind attention
    assert heads.prefill.exchange > 10 * prompt.prefill.exchange > 0
    assert heads.memory.weights == one.memory.weights // 2 and prompt.memory.weights == one.memory.weights
    assert heads.memory.cache == prompt.memory.cache == one.memory.cache // 2
    assert found.best(0) == 2
    assert ways.Ways(found.sharings, found.forecasts, 1 << 20, 141e9).best(0) == 1  # many tokens: weights are read in parts
    assert ways.Ways(found.sharings, found.forecasts, 256, 80e9).best(0) is not None
    assert ways.Ways(found.sharings, found.forecasts, 256, 1e9).best(0) is None


def test_what_travels_is_what_was_sent_on_two_gpus(asked):
    """Keys and values of an 8B shape's 512K tokens: 51.5 GB of both processes were recorded, two thirds of them by one."""
    side = ways.compare(asked, [LENGTH], 2, 0, 141e9).side(2, 0)
    recorded = 51539607552
    assert side.sent["keys and values"] == recorded * 2 // 3
    assert side.sent["the estimate's cells"] == 32 * links.cell_bytes(AttentionSizes(key_len=LENGTH), 2, DEFAULT, 8, 128)


def test_bytes_of_a_layer():
    sizes = AttentionSizes(query_len=4096, key_len=4096)
    own = 8 * 2048 * 2 * 128 * 2
    assert links.key_value_bytes(sizes, 2) == own and links.key_value_bytes(sizes, 4) == own * 3 // 2
    window = {"window": 100, "sinks": 28}
    assert Attended(sizes, "dense", {}, 1.0).bytes(Sharing(1, 2)) == (0, own)
    assert Attended(sizes, "dense", {}, 1.0).bytes(Sharing(2, 2)) == (0, own // 2)
    assert Attended(sizes, "dense", {}, 1.0).bytes(Sharing(2, 1)) == (0, 0)
    assert Attended(sizes, "sink_window", window, 1.0).bytes(Sharing(1, 2)) == (0, 2 * 128 * 8 * 256 * 2)
    assert Attended(sizes, "sink_window", window | {"window": (0, 100)}, 1.0).bytes(Sharing(1, 2)) == (0, own)
    options = {"estimate": DEFAULT.variants, "stride": 4, "block": 128}
    cells, keys = Attended(sizes, "xattention", options, 1.0).bytes(Sharing(1, 2))
    assert keys == own and cells == 8 * 2048 * 64 + 4 * 8 * 2048 // 128
    # a token: one latency a layer, and two sums where heads are divided
    step = lambda sharing: exchanged.seconds([], sharing, 8192, 32, H200, step=True)
    assert step(Sharing(1, 2)) == pytest.approx(32 * links.of(H200).latency)
    assert step(Sharing(2, 1)) == pytest.approx(64 * links.step_sum_seconds(8192, 2, H200))


def test_what_is_hidden_is_not_waited_for():
    blocks = 1 << 30
    whole = links.exchange_seconds(blocks, H200)
    assert links.exposed_seconds(1, blocks, 1.0, 8, H200) == pytest.approx(whole / 4, rel=0.1)
    assert links.exposed_seconds(1, blocks, 0.0, 8, H200) > whole
    assert links.exposed_seconds(0, blocks, 1.0, 8, H200) == 0  # a ring behind long attention
    assert links.exposed_seconds(1, blocks, 1.0, 1, H200) > whole  # one head has nothing beside it


def test_queries_travel_where_they_are_fewer():
    query, pair = links.query_bytes(128, 128, 2), 512
    assert query == 516
    assert links.travelling(pair * 1000, 4 * query * 1000) == "keys"  # four query heads a KV head
    assert links.travelling(pair * 1000, query * 1000) == "keys"
    assert links.travelling(pair * 1000, query * 500) == "queries"


def test_the_command(tmp_path, capsys):
    from transformers import LlamaConfig

    small = {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    LlamaConfig(**SHAPE | small | {"num_key_value_heads": 2}).save_pretrained(tmp_path)
    given = ["cost", str(tmp_path), "--device", "h200", "--lengths", "64K", "--gpus", "4"]
    assert cli.main(given) == 0
    text = capsys.readouterr().out
    assert "TP 2 × CP 2" in text and "CP 4: a GPU sends at most" in text and text.count("the fastest") == 1 and "links: 380 GB/s" in text
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["tp"], one["cp"]) for one in found] == [(1, 1), (2, 2), (1, 4)]
    assert sum(fastest for one in found for fastest in one["fastest"]) == 1
    assert cli.main([*given[:-1], "0"]) == 2
