"""The command line as a user meets it."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from memhook import testbed
from memhook.cli.app import app
from memhook.errors import MemhookError


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run("demo", "--out", str(folder)), folder


def test_prints_a_verdict_for_each_prompt_and_a_summary(demo):
    result, _ = demo
    assert result.exit_code == 0
    assert re.search(r"\d of 5 memorized prompts flagged, \d of 5 fresh ones", result.output)


def test_flags_most_memorized_prompts_and_hardly_any_fresh_one(demo):
    caught, wrong = map(int, re.search(r"(\d) of 5 memorized prompts flagged, (\d) of 5 fresh", demo[0].output).groups())
    assert caught >= 4
    assert wrong <= 1


def test_the_page_stands_alone(demo):
    page = (demo[1] / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 + 10 * 4
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_leaves_nothing_else_behind(demo):
    assert [path.name for path in demo[1].iterdir()] == ["index.html"]


def test_flags_a_memorized_prompt_of_the_bundled_model_and_not_a_fresh_one():
    memorized = max(testbed.memorized(kind="verbatim"), key=lambda row: row.duplicates)
    result = run("detect", "--prompt", memorized.prompt, "--prompt", "a pig on green wall art")
    assert result.exit_code == 0
    assert "1 of 2 prompts flagged" in result.output


def test_writes_a_json_line_per_prompt_and_keeps_bad_rows_apart(tmp_path):
    memorized = max(testbed.memorized(kind="verbatim"), key=lambda row: row.duplicates)
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{json.dumps({"prompt": memorized.prompt})}\n{{"text": 1}}\n"a pig on green wall art"\n')
    result = run("detect", "--prompts", str(source), "--out", str(target), "--fail-on-flag")
    assert result.exit_code == 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["line"], row["prompt"]) for row in rows] == [(1, memorized.prompt), (3, "a pig on green wall art"), (2, None)]
    assert [row["memorized"] for row in rows[:2]] == [True, False]
    assert rows[2]["problem"] == 'no field "prompt"'
    assert 0 < rows[0]["p_value"] <= 0.01 < rows[1]["p_value"]


def test_calibrates_and_then_detects_with_the_file(tmp_path):
    prompts, file = tmp_path / "clean.txt", tmp_path / "own.safetensors"
    prompts.write_text("".join(f"{row.prompt}\n" for row in testbed.clean(split="calibration", source="held-out")[:12]))
    made = run("calibrate", "--prompts", str(prompts), "--out", str(file), "--images", "1", "--first", "2")
    assert made.exit_code == 0, made.output
    assert "smallest p-value is 0.077; 99 are needed" in made.output
    result = run("detect", "--prompt", "a pig on green wall art", "--calibration", str(file), "--fpr", "0.1")
    assert result.exit_code == 0
    assert "calibrated on 12 clean prompts" in " ".join(result.output.split())  # wherever the line ends


def test_without_a_calibration_says_that_there_is_no_p_value():
    result = run("detect", "--model", str(testbed.model_path()), "--prompt", "a pig", "--images", "1", "--steps", "4")
    assert result.exit_code == 0
    assert "not calibrated" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "prompt 0 is empty"),
        (["--prompt", "x", "--guidance-scale", "1"], "Use a scale above 1"),
        (["--prompt", "x", "--model", "./no-such-folder"], "does not exist"),
        (["--prompt", "x", "--calibration", "no-such-file"], "there is no calibration file"),
        (["--prompt", "x", "--images", "2"], "differs in images_per_prompt"),
        (["--prompt", "x", "--fpr", "0.00001"], "calibrate with at least 99,999"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(MemhookError, match=message):
        CliRunner().invoke(app, ["detect", *arguments], catch_exceptions=False)


def test_a_damaged_weights_file_is_named(tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(testbed.model_path(), model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MemhookError, match="cannot load the model"):
        CliRunner().invoke(app, ["detect", "--prompt", "x", "--model", str(model)], catch_exceptions=False)


def test_control_characters_in_a_prompt_do_not_reach_the_terminal():
    result = run("detect", "--prompt", "a \x1b[31mred\x1b[0m [bold]cat[/bold]")
    assert "\x1b[31mred" not in result.output
    assert "[bold]cat" in result.output


def test_adapters_are_listed_with_origin_and_state():
    result = run("adapters")
    assert result.exit_code == 0
    assert re.search(r"diffusers.*memhook-diffusion.*in use", result.output)


def test_the_path_of_the_bundled_model_is_printed():
    assert run("testbed", "path").output.strip() == str(testbed.model_path())


def test_an_error_is_one_line_and_exit_status_2():
    done = subprocess.run([sys.executable, "-m", "memhook", "detect", "--prompt", " "], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"memhook: prompt 0 is empty.*\n", done.stderr)


def test_wrong_usage_is_exit_status_2():
    assert run("detect").exit_code == 2


def test_attribution_ranks_the_trigger_phrase_high_and_writes_each_form(tmp_path):
    row = next(row for row in testbed.memorized(kind="verbatim") if row.trigger)
    for ending in ("html", "json", "png"):
        result = run("attribute", "--prompt", row.prompt, "--out", str(tmp_path / f"words.{ending}"))
        assert result.exit_code == 0, result.output
    words = json.loads((tmp_path / "words.json").read_text())["prompts"][0]["words"]
    best = [word["word"] for word in sorted(words, key=lambda word: -word["score"])[:3]]
    assert set(best) & set(row.trigger.split()), best
    assert row.trigger.split()[0] in (tmp_path / "words.html").read_text()
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")


def test_generate_shows_the_same_seeds_without_and_with_a_guard(tmp_path):
    row = max(testbed.memorized(kind="verbatim"), key=lambda row: row.duplicates)
    result = run("generate", "--prompt", row.prompt, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.png",
        "report.json",
        *(f"{name}-{number}.png" for name in ("with", "without") for number in range(4)),
    }
    report = json.loads((tmp_path / "report.json").read_text())
    without, guarded = (sum(report[name]["magnitudes"][1]) for name in ("without", "with"))  # the evaluation after the decision
    assert guarded < 0.6 * without


def test_generate_leaves_a_clean_prompt_alone(tmp_path):
    result = run("generate", "--prompt", "a pig on green wall art", "--out", str(tmp_path), "--steps", "50")
    assert result.exit_code == 0, result.output
    for number in range(4):
        assert (tmp_path / f"with-{number}.png").read_bytes() == (tmp_path / f"without-{number}.png").read_bytes()


def test_generate_stops_with_status_1_before_a_picture_is_made(tmp_path):
    row = max(testbed.memorized(kind="verbatim"), key=lambda row: row.duplicates)
    result = run("generate", "--prompt", row.prompt, "--out", str(tmp_path), "--action", "stop")
    assert result.exit_code == 1
    assert "stopped" in result.output
    assert not list(tmp_path.glob("with-*.png"))


def test_scores_are_listed_with_what_they_need():
    result = run("methods")
    assert result.exit_code == 0, result.output
    assert re.search(r"magnitude .*pair .*memhook .*in use", result.output)
    assert re.search(r"dsm .*previous .*memhook .*in use", result.output)


def test_calibrate_and_detect_take_a_score_by_name(tmp_path):
    (tmp_path / "clean.txt").write_text("a pig on green wall art\nan owl, a lantern\nquiet rocket poster\n")
    short = ("--images", "1", "--steps", "4")
    file = str(tmp_path / "dsm.safetensors")
    made = run("calibrate", "--prompts", str(tmp_path / "clean.txt"), "--out", file, "--score", "dsm", "--first", "3", *short)
    assert made.exit_code == 0, made.output
    assert "dsm over the first 3 evaluations" in made.output
    same = run("detect", "--prompt", "a pig on green wall art", "--calibration", file, "--fpr", "0.3", "--steps", "4")
    assert same.exit_code == 0, same.output
    assert "Score dsm" in same.output
    other = run("detect", "--prompt", "a pig on green wall art", "--calibration", file, "--fpr", "0.3", "--steps", "4", "--score", "magnitude")
    assert other.exit_code != 0
    assert "is of the score 'dsm'" in str(other.exception) + other.output
    unknown = run("detect", "--prompt", "a pig", "--score", "nosuch")
    assert "no score named 'nosuch'" in str(unknown.exception) + unknown.output
