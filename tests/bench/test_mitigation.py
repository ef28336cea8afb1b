"""The benchmark of mitigation: the ways, the comparison at one similarity, the guard, and the command."""

import csv
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memhook import testbed
from memhook.baselines import add_random_tokens
from memhook.bench import mitigation
from memhook.bench.guarded import guarded_rows
from memhook.bench.mitigation import BASELINES, COUNTS, NONE, OPTIMIZED, REFERENCE, Descent, Outcome, Way, all_ways, points, run_ways
from memhook.bench.mitigation_report import verdict
from memhook.bench.samples import Judged, Pictures, Sample, open_studio
from memhook.cli.app import app
from memhook.errors import MemhookError
from memhook.testbed.artwork import SUBJECTS

SAMPLES = [Sample(prompt, number) for number, prompt in enumerate(testbed.memorized(kind="verbatim")[:40])]


def outcome(family, setting, similarity, alignment, *, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    shape = len(SAMPLES)
    judged = Judged(similarity + noise * rng.normal(size=shape), alignment + noise * rng.normal(size=shape))
    return Outcome(Way(family, setting), Pictures(np.zeros((shape, 32, 32, 3), np.uint8), np.ones(shape)), judged, 0.0)


CURVE = [outcome(NONE, 0, 0.9, 1.0), outcome(OPTIMIZED, 1, 0.5, 0.8), outcome(OPTIMIZED, 0.5, 0.2, 0.4)]


@pytest.mark.parametrize(
    ("similarity", "alignment", "gain", "verdict"),
    [(0.7, 0.8, 0.1, "better"), (0.7, 0.95, -0.05, "worse"), (0.35, 0.5, 0.1, "better"), (0.1, 0.0, None, "beyond the curve")],
)
def test_baselines_are_compared_at_their_own_similarity(similarity, alignment, gain, verdict):
    row = points([*CURVE, outcome(BASELINES[0], 2, similarity, alignment)], SAMPLES)[-1]
    assert row.verdict == verdict
    assert (row.gain is None) if gain is None else row.gain.value == pytest.approx(gain)


def test_a_small_difference_among_noisy_samples_is_not_told_apart():
    row = points([*CURVE, outcome(BASELINES[0], 2, 0.7, 0.89, noise=0.3)], SAMPLES)[-1]
    assert row.verdict == "not told apart"
    assert row.gain.low < 0 < row.gain.high


def test_without_a_curve_there_is_nothing_to_compare_with():
    with pytest.raises(MemhookError, match="no curve"):
        points([outcome(BASELINES[0], 2, 0.7, 0.89)], SAMPLES)


def test_the_verdict_counts():
    baselines = [outcome(BASELINES[0], 2, 0.7, 0.8), outcome(BASELINES[0], 4, 0.7, 0.95), outcome(BASELINES[1], 4, 0.1, 0.0)]
    said = verdict("verbatim", points([*CURVE, *baselines], SAMPLES))
    assert "does not dominate" in said
    assert "of 3 baseline points it is better than 1, not told apart from 0, worse than 1, and does not come down to the similarity of 1" in said
    assert "dominates every" in verdict("verbatim", points([*CURVE, baselines[0]], SAMPLES))


def test_the_ways_are_those_of_the_paper():
    ways = all_ways([0.5, 2.0, 1.0])
    assert [way.setting for way in ways if way.family == OPTIMIZED] == [2.0, 1.0, 0.5]
    assert [way.setting for way in ways if way.family == BASELINES[0]] == list(COUNTS) == [1, 2, 4, 6, 8]
    assert {way.family for way in ways} == {NONE, OPTIMIZED, REFERENCE, *BASELINES}


@pytest.fixture(scope="module")
def studio():
    return open_studio(steps=2)


def test_every_way_starts_from_the_same_noise_and_changes_what_it_says(studio):
    samples = SAMPLES[:3]
    noise = studio.noise([sample.seed for sample in samples])
    plain = studio.encode([sample.prompt.prompt for sample in samples])

    def changed(family, setting, **options):
        return mitigation._changed(studio, samples, noise, Way(family, setting), 0.5, Descent(**options))[0]

    assert torch.equal(changed(NONE, 0), plain)
    texts = [add_random_tokens(sample.prompt.prompt, studio.pipeline.tokenizer, count=4, seed=sample.seed) for sample in samples]
    assert torch.equal(changed(BASELINES[0], 4), studio.encode(texts))
    assert torch.equal(changed(OPTIMIZED, 1000.0), plain)  # all are below it
    [first] = studio.evaluations(plain, noise)
    before = first.objective(plain).detach()
    assert (first.objective(changed(OPTIMIZED, 0.0, max_steps=3)).detach() < before).all()
    for family in (*BASELINES, REFERENCE):
        assert not torch.equal(changed(family, 1), plain)


def test_a_sample_does_not_depend_on_its_neighbors(studio):
    ways = [Way(OPTIMIZED, 1.0), Way(BASELINES[3], 0.5)]
    together, alone = (run_ways(studio, part, ways, clean_magnitude=0.5) for part in (SAMPLES[:3], SAMPLES[1:2]))
    for ours, own in zip(together, alone, strict=True):
        assert np.abs(ours.pictures.images[1].astype(int) - own.pictures.images[0]).max() <= 2  # other batch sizes take other kernels


def test_a_guard_leaves_clean_prompts_alone_and_changes_flagged_ones(studio):
    rows = {row.group: row for row in guarded_rows(studio, per_source=1, sources=["held-out"])}
    assert rows["clean"].prompts == 1
    assert rows["clean"].changed_though_not_flagged == rows["memorized"].changed_though_not_flagged == 0
    assert rows["memorized"].flagged == 1
    assert rows["memorized"].changed_where_flagged == rows["memorized"].pictures_flagged == 4
    with pytest.raises(MemhookError, match="per-source is 0"):
        guarded_rows(studio, per_source=0)


def test_the_command_prints_writes_and_goes_on(tmp_path, monkeypatch):
    arguments = ["bench", "mitigation", "--verbatim", "2", "--templates", "1", "--steps", "2", "--guarded", "0"]
    arguments += ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    for kind in ("verbatim", "template"):
        assert f"{kind}: the optimized embedding" in first.output.replace("\n", " ")
        with (tmp_path / "o" / f"mitigation-{kind}.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        assert [(row["family"], float(row["setting"])) for row in rows] == [(way.family, way.setting) for way in all_ways()]
        about = json.loads((tmp_path / "o" / f"mitigation-{kind}.json").read_text())
        assert about["samples"] == {"verbatim": 2, "template": 1}[kind]
    assert (tmp_path / "o" / "mitigation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "o" / "mitigation-pictures.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("memhook.bench.samples.Studio.make", lambda *_: pytest.fail("pictures were made again"))
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    assert second.output == first.output


def test_captions_name_subjects_that_the_reader_knows():
    assert {sample.prompt.subject for sample in SAMPLES} <= set(SUBJECTS)
