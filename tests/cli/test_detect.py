"""Judging many prompts: files of every kind, a false discovery rate, accepted mismatches, and interrupted runs."""

import csv
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import false_discovery_control
from typer.testing import CliRunner

from memhook import Calibration, CalibrationError, MemhookError, testbed
from memhook.bench.sampling import Sampling
from memhook.cli import detect as command
from memhook.cli.app import app
from memhook.cli.detect import Decision, discovered, run_detect
from memhook.cli.journal import Journal
from memhook.cli.verdicts import Verdict
from memhook.detection.prompt_files import PromptRow

PROMPTS = ["a pig on green wall art", "quiet rocket poster", "an owl, a lantern", "silver tree by Ada Marsh"]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, list(arguments))


@pytest.fixture
def quick(monkeypatch):
    """Verdicts without a model, one p-value a prompt; counts how many were judged anew."""
    p_values = [0.001, 0.8, math.nan, 0.02]
    judged = []

    def verdicts(rows, sampling, known, decision, *, start=0):
        for number, row in list(enumerate(rows))[start:]:
            judged.append(row.prompt)
            p = p_values[number]
            yield Verdict(row.line, row.prompt, 1.0, p, p, None if math.isnan(p) or decision.fdr is not None else p <= decision.fpr)

    monkeypatch.setattr(command, "verdicts", verdicts)
    return judged


ROWS = [*(PromptRow(number, prompt) for number, prompt in enumerate(PROMPTS, 1)), PromptRow(5, None, "the prompt is empty")]
SAMPLING = Sampling(None, None, 50, 7.5, "cpu", "float32", 0, 2)


def judge(out, *, decision=None, fail_on_flag=False, sampling=SAMPLING):
    return run_detect(ROWS, sampling, decision or Decision(None, 0.01), out=None if out is None else str(out), fail_on_flag=fail_on_flag)


def test_every_kind_of_file_holds_every_row(tmp_path, quick):
    for ending in (".jsonl", ".csv", ".parquet"):
        judge(tmp_path / f"out{ending}")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in lines] == [1, 2, 3, 4, 5]
    assert [row.get("memorized") for row in lines] == [True, False, None, False, None]
    assert lines[2]["p_value"] is None
    assert lines[4]["problem"] == "the prompt is empty"
    table = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["prompt"] for row in table] == [*PROMPTS, ""]
    assert table[0]["p_value"] == "0.001"
    assert table[4]["problem"] == "the prompt is empty"
    parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["memorized"] for row in parquet] == [True, False, None, False, None]
    assert [row["line"] for row in parquet] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "out.parquet"]


def test_text_holds_the_flagged_prompts(tmp_path, quick):
    assert judge(tmp_path / "flagged.txt", fail_on_flag=True) == 1
    assert (tmp_path / "flagged.txt").read_text() == f"{PROMPTS[0]}\n"


def test_another_ending_is_refused_before_anything_runs(tmp_path, quick):
    with pytest.raises(MemhookError, match=r"ends in .xlsx; expected .jsonl, .csv, .parquet, .txt, or -"):
        judge(tmp_path / "out.xlsx")
    assert quick == []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, quick, monkeypatch):
    whole = command.verdicts

    def interrupted(*arguments, **options):
        for number, verdict in enumerate(whole(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield verdict

    monkeypatch.setattr(command, "verdicts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge(tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    with (tmp_path / "out.jsonl.partial").open("a") as file:
        file.write('{"line": 3, "prom')  # a line that was being written
    monkeypatch.setattr(command, "verdicts", whole)
    quick.clear()
    judge(tmp_path / "out.jsonl")
    assert quick == PROMPTS[2:]
    assert [json.loads(line)["line"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_run_with_other_settings_does_not_mix_in(tmp_path, quick):
    settings = {**{key: value for key, value in vars(SAMPLING).items() if key != "batch_size"}, "seed": 1}
    journal = Journal(tmp_path / "out.jsonl", settings)
    list(journal.recorded([Verdict(1, "a", 1.0, 1.0, 0.5, False)], []))
    with pytest.raises(MemhookError, match=r"another .*seed.*move it away"):
        judge(tmp_path / "out.jsonl")
    journal.path.write_text("not a journal\n")
    with pytest.raises(MemhookError, match="cannot be read as the results"):
        judge(tmp_path / "out.jsonl")


def test_a_false_discovery_rate_decides_over_all_prompts():
    rng = np.random.default_rng(0)
    p_values = np.concatenate([rng.integers(1, 4, 20), rng.integers(1, 1001, 80)]) / 1001
    found = discovered([Verdict(n, "p", 1.0, 1.0, float(p), None) for n, p in enumerate(p_values)], 0.1)
    assert [row.memorized for row in found] == (false_discovery_control(p_values) <= 0.1).tolist()


def test_undecided_prompts_stay_undecided_under_a_false_discovery_rate(tmp_path, quick):
    judge(tmp_path / "out.jsonl", decision=Decision(None, 0.01, fdr=0.05))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("memorized") for row in rows] == [True, False, None, True, None]


def test_batches_do_not_change_what_is_resumed():
    """Verdicts of the second half are those of a whole run, whatever the batches."""
    decision = Decision(None, 0.05)
    sampling = Sampling(None, 2, 50, 7.5, "cpu", "float32", 3, 3)
    known = decision.load(sampling).accepting("images_per_prompt")
    whole = list(command.verdicts(ROWS[:4], sampling, known, decision))
    rest = list(command.verdicts(ROWS[:4], sampling, known, decision, start=2))
    assert [row.score for row in rest] == pytest.approx([row.score for row in whole[2:]], rel=1e-4)
    assert "images_per_prompt: the calibration was made with 4, this run used 2" in whole[0].accepted_mismatches


def test_an_accepted_mismatch_is_recorded_with_the_result(tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["detect", "--prompt", PROMPTS[0], "--guidance-scale", "5", "--out", str(out)]
    assert isinstance(run(*arguments).exception, MemhookError)
    result = run(*arguments, "--accept-mismatch", "guidance_scale")
    assert result.exit_code == 0
    assert "Accepted, so that p-values may be wrong: the setting differs in guidance_scale" in " ".join(result.output.split())
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["accepted_mismatches"].startswith("the setting differs in guidance_scale")


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision(None, 0.01, accept=("colour",)), "no setting colour"),
        (Decision(None, 0.01, fdr=2.0), "false discovery rate is 2"),
        (Decision(None, 1e-6), "at least 999,999"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_anything_runs(decision, message, quick):
    with pytest.raises((MemhookError, CalibrationError), match=message):
        judge(None, decision=decision)
    assert quick == []


def test_a_calibration_file_is_shown_with_its_setting_and_thresholds():
    result = run("calibration", "show", str(testbed.calibration_path()))
    assert result.exit_code == 0
    known = Calibration.load(testbed.calibration_path())
    assert "1200 clean prompts, score over the first 3 of 10 evaluations; smallest p-value 0.00083" in " ".join(result.output.split())
    assert f"{known.threshold(0.01):.4g}" in result.output
    assert f"{known.threshold(0.01, 0.95):.4g}" in result.output
    assert "needs 2,995 prompts" in result.output
    for field in ("guidance_scale", "timesteps", "images_per_prompt", "model", "text_encoder"):
        assert field in result.output
