import dataclasses

import pytest

from sparsify.commands.eval import report
from sparsify.commands.eval.cells import Cell, compare, differences, worst
from sparsify.errors import UnsupportedError


def cell(setting, scores, task="niah", **more):
    names = tuple(f"q{i}" for i in range(len(scores)))
    return Cell(**{"setting": setting, "task": task, "length": 4096, "scores": tuple(map(float, scores)), "questions": names, **more})


DENSE = cell("dense", [1] * 18 + [0] * 2)


def test_questions_are_paired():
    """Two lost and two gained: the means are equal, the answers are not."""
    one = compare(cell("sparse", [0, 0] + [1] * 18), DENSE)
    assert (one.mean, one.lost, one.gained, one.sure) == (0, 2, 2, False)
    wider, narrower = one.interval, compare(cell("sparse", [1] * 18 + [0] * 2), DENSE).interval
    assert wider[1] - wider[0] > narrower[1] - narrower[0]


def test_other_questions_are_no_pair():
    with pytest.raises(UnsupportedError, match="other questions"):
        compare(cell("sparse", [1] * 20, questions=tuple("abcdefghijklmnopqrst")), DENSE)


def test_less_nll_is_better():
    dense = cell("dense", [2.0, 2.5, 3.0], "text", metric="nll", higher_is_better=False)
    one = compare(cell("sparse", [2.1, 2.6, 3.1], "text", metric="nll", higher_is_better=False), dense)
    assert one.mean == pytest.approx(-0.1) and one.lost == 3 and one.sure
    assert one.interval == (pytest.approx(-0.1), pytest.approx(-0.1))


def test_the_worst_task_is_named_whatever_the_mean_says():
    better = [cell("sparse", [1] * 20, "easy"), cell("dense", [0] * 20, "easy")]
    lossy = [cell("sparse", [0] * 3 + [1] * 15 + [0] * 2, "hard"), dataclasses.replace(DENSE, task="hard")]
    text = [cell(name, [9.0], "text", metric="nll", higher_is_better=False) for name in ("sparse", "dense")]
    found = worst(differences([*better, *lossy, *text], "dense"))
    assert list(found) == ["sparse"] and found["sparse"].cell.task == "hard" and found["sparse"].lost == 3


def test_scores_that_are_shares_of_words_have_an_interval():
    third = cell("dense", [1 / 3, 2 / 3, 1, 1, 1, 1])
    low, high = third.interval
    assert 0 < low < third.mean < high <= 1 and third.bounded
    assert not cell("dense", [12.5, 3.0], metric="perplexity").bounded


def test_failures_are_rows_and_no_numbers():
    broken = cell("sparse", [], error="OutOfMemoryError: 80 GB")
    text = report.table([DENSE, broken], 200)
    assert "80 GB" in text and "worst" not in text
    data = report.data([DENSE, broken], {"model": "m"})
    assert data["worst"] == {} and data["cells"][1]["error"] and "mean" not in data["cells"][1]


def test_the_table_shows_the_difference_beside_each_score():
    sparse = cell("τ 0.5", [0] * 8 + [1] * 10 + [0] * 2, density=0.25, density_by_layer=(0.5, 0.0))
    text = report.table([DENSE, sparse], 200)
    row = next(line for line in text.splitlines() if "τ 0.5" in line and "│" in line)
    assert "0.500" in row and "-0.400" in row and "*" in row and "8 / 0" in row and "25.0%" in row
    assert "worst of τ 0.5: niah at 4K: -0.400" in text and "8 of 20 worse, 0 better" in text
    assert report.data([DENSE, sparse], {})["worst"]["τ 0.5"]["lost"] == 8


def test_a_setting_that_left_nothing_out_is_said_to_be_dense():
    text = report.table([DENSE, cell("default", [1] * 18 + [0] * 2)], 200)
    assert "default: no blocks were selected at 4K" in text


def test_needles_by_depth(tmp_path):
    depths = tuple(i / 20 for i in range(20))
    lost_early = cell("sparse", [0] * 2 + [1] * 16 + [0] * 2, depths=depths)
    found = report.by_depth([dataclasses.replace(DENSE, depths=depths), lost_early, cell("other", [1])])
    assert found["niah", "sparse"][4096][0] == (0, 2) and found["niah", "dense"][4096][0] == (1, 2)
    assert ("niah", "other") not in found
    report.plot([dataclasses.replace(DENSE, depths=depths), lost_early], str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UnsupportedError, match="no task says"):
        report.plot([DENSE], str(tmp_path / "none.png"))
