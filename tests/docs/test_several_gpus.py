"""The forecast table of docs/several-gpus.md is what the forecast says."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_is_the_forecast():
    pytest.importorskip("transformers")
    from benchmarks.mesh import forecast

    page = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    found = page.partition("<!-- gpus: python -m benchmarks.mesh.forecast -->\n")[2].partition("\n<!-- /gpus -->")[0]
    assert found == forecast.text()
