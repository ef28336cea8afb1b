"""The benchmark of the whitened magnitude: its rows, its limits, the command."""

import csv

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memhook
from memhook import testbed
from memhook.bench.samples import open_studio
from memhook.bench.whitening import first_evaluations, plain, whitening_rows
from memhook.cli.app import app
from memhook.errors import MemhookError


@pytest.fixture(scope="module")
def studio():
    return open_studio(steps=10)


def test_a_prompts_images_stand_side_by_side_and_differ_in_noise_only(studio):
    prompts = testbed.memorized(kind="verbatim")[:3]
    found = torch.cat([plain(one) for one in first_evaluations(studio, prompts, images=2, seed=7)])
    embeddings = studio.encode([prompts[1].prompt] * 2)
    [alone] = studio.evaluations(embeddings, studio.noise([9, 10]))
    np.testing.assert_allclose(found[2:4], memhook.magnitude(alone.pred_cond, alone.pred_uncond), rtol=1e-4)


def test_rows_compare_both_scores_on_the_same_prompts(studio):
    rows = whitening_rows(studio, per_source=5, fitted=(8, 32), images=2)
    assert [(row.score.split()[0], row.fitted, row.images) for row in rows] == [
        ("magnitude", 0, 1), ("magnitude", 0, 2), ("whitened", 8, 1), ("whitened", 8, 2), ("whitened", 32, 1), ("whitened", 32, 2)
    ]  # fmt: skip
    assert all(row.auc.value > 0.9 and row.auc.low <= row.auc.value <= row.auc.high for row in rows)
    with pytest.raises(MemhookError, match="per-source is 0"):
        whitening_rows(studio, per_source=0)
    with pytest.raises(MemhookError, match="fitted is 2000"):
        whitening_rows(studio, per_source=1, fitted=(2000,))


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(whitening_rows, "__kwdefaults__", whitening_rows.__kwdefaults__ | {"fitted": (16,), "images": 1})
    page = tmp_path / "page.md"
    page.write_text("<!-- bench whitening: begin -->\n<!-- bench whitening: end -->\n")
    run = CliRunner().invoke(app, ["bench", "whitening", "--per-source", "2", "--out", str(tmp_path / "o"), "--page", str(page)])
    assert run.exit_code == 0, run.output
    assert "96 memorized and 8 clean prompts" in page.read_text()
    with (tmp_path / "o" / "whitening.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["fitted"] for row in rows] == ["0", "16"]
