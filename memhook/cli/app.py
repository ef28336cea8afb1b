"""The commands and their options; what they do is in the modules beside this one."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from memhook import __version__
from memhook.cli.bench_app import bench_app
from memhook.cli.options import BatchSize, Device, Dtype, GuidanceScale, Model, Score, Seed, Steps

app = typer.Typer(
    name="memhook",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is this diffusion model about to hand me a copy of its training data, because of which words, and how do I stop it?",
)
testbed_app = typer.Typer(no_args_is_help=True, help="The bundled model that really memorizes.")
calibration_app = typer.Typer(no_args_is_help=True, help="Calibration files.")
app.add_typer(calibration_app, name="calibration")
app.add_typer(testbed_app, name="testbed")
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memhook {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options of the command itself; its help is that of `app`."""


class Action(str, Enum):
    """What a guard does with a flagged prompt."""

    MITIGATE = "mitigate"
    STOP = "stop"
    WARN = "warn"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page index.html.")] = Path("memhook-demo"),
    seed: Seed = 1,
) -> None:
    """Watch the bundled model on memorized and fresh prompts; print a table and write one HTML page."""
    from memhook.cli.demo import run_demo

    run_demo(out, seed=seed)


@app.command()
def detect(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt to check; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts: .txt, .jsonl, .csv or .parquet; - for text on standard input.")] = None,
    model: Model = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file made in the same setting; the bundled one for the bundled model.")
    ] = None,
    fpr: Annotated[float, typer.Option(help="False-positive rate: the share of innocent prompts flagged.")] = 0.01,
    fdr: Annotated[
        float | None, typer.Option(help="Decide by a false discovery rate over all prompts instead: the share of innocent ones among those flagged.")
    ] = None,
    accept_mismatch: Annotated[
        list[str] | None, typer.Option(help="A setting that may differ from the calibration's, such as guidance_scale; recorded with the result.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Write the verdicts to this file: .jsonl, .csv, .parquet, or .txt for the flagged prompts; - for JSON lines on standard output. "
            "An interrupted run goes on from what it left beside the file."
        ),
    ] = None,
    fail_on_flag: Annotated[bool, typer.Option("--fail-on-flag", help="Exit with status 1 when a prompt is flagged.")] = False,
    images: Annotated[int | None, typer.Option(help="Images per prompt; the calibration's number by default, else 4.")] = None,
    score: Score = None,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
) -> None:
    """Say for each prompt whether the model seems to have memorized a picture for it."""
    from memhook.bench.sampling import Sampling
    from memhook.cli.detect import Decision, run_detect
    from memhook.detection.prompt_files import PromptRow, read_prompts

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt (once or more) or --prompts FILE")
    rows = [PromptRow(number, text) for number, text in enumerate(prompt or [], 1)] if prompts is None else read_prompts(prompts)
    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size)
    decision = Decision(calibration, fpr, fdr, tuple(accept_mismatch or ()), score)
    raise typer.Exit(run_detect(rows, sampling, decision, out=out, fail_on_flag=fail_on_flag))


@app.command()
def calibrate(
    prompts: Annotated[
        str, typer.Option(help="File of prompts that are not memorized: .txt, .jsonl, .csv or .parquet; - for text on standard input.")
    ],
    out: Annotated[Path, typer.Option(help="The calibration file to write, .safetensors.")],
    model: Model = None,
    first: Annotated[int | None, typer.Option(help="Score over the first so many evaluations, and run only these; all if not given.")] = 10,
    images: Annotated[int | None, typer.Option(help="Images per prompt; 4 by default.")] = None,
    score: Score = None,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the first image; take another one than for detection.")] = 1_000_000,
    batch_size: BatchSize = 8,
) -> None:
    """Make a calibration file from prompts known not to be memorized (99 or more for a false-positive rate of 1%)."""
    from memhook.bench.sampling import Sampling
    from memhook.cli.calibrate import run_calibrate
    from memhook.detection.prompt_files import read_prompts

    run_calibrate(
        read_prompts(prompts), Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size), first=first, out=out, score=score
    )


@calibration_app.command("show")
def calibration_show(file: Annotated[Path, typer.Argument(help="A calibration file.")]) -> None:
    """Print what a calibration file holds: its prompts, the setting it is good for, and thresholds."""
    from memhook.cli.calibrate import show_calibration

    show_calibration(file)


@app.command()
def attribute(
    prompt: Annotated[str, typer.Option(help="The prompt whose words are scored.")],
    model: Model = None,
    evaluations: Annotated[int, typer.Option(help="Average over the first so many evaluations; each costs one backward pass.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the scores: .html, .png or .json.")] = None,
    images: Annotated[int | None, typer.Option(help="Images to average over; 4 by default.")] = None,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> None:
    """Score the words of a prompt by how strongly they drive the text-conditional prediction."""
    from memhook.bench.sampling import Sampling
    from memhook.cli.attribute import run_attribute

    run_attribute(prompt, Sampling(model, images, steps, guidance_scale, device, dtype, seed, 1), evaluations=evaluations, out=out)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, comparison.png and report.json.")],
    model: Model = None,
    calibration: Annotated[Path | None, typer.Option("--guard", help="Calibration file; the bundled one for the bundled model.")] = None,
    action: Annotated[Action, typer.Option(help="What to do with a flagged prompt.")] = Action.MITIGATE,
    fpr: Annotated[float, typer.Option(help="False-positive rate of the guard.")] = 0.01,
    decide_after: Annotated[int, typer.Option(help="Evaluations after which the guard decides.")] = 1,
    target: Annotated[float | None, typer.Option(help="Magnitude to reach, per sample; the clean prompts' median if not given.")] = None,
    images: Annotated[int | None, typer.Option(help="Images; the calibration's number by default.")] = None,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> None:
    """Generate the same seeds without and with a guard, side by side."""
    from memhook.bench.sampling import Sampling
    from memhook.cli.generate import run_generate

    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, 1)
    status = run_generate(prompt, sampling, calibration=calibration, action=action.value, fpr=fpr, decide_after=decide_after, target=target, out=out)
    raise typer.Exit(status)


@app.command()
def adapters() -> None:
    """List the installed adapters, where they come from, and whether they are in use."""
    from memhook.cli.adapters import print_adapters

    print_adapters()


@app.command()
def methods() -> None:
    """List the installed scores: what each needs, where it was published, whose it is, and whether it can be used."""
    from memhook.cli.methods import print_methods

    print_methods()


@testbed_app.command()
def path() -> None:
    """Print the folder of the bundled model, for StableDiffusionPipeline.from_pretrained."""
    from memhook.testbed import model_path

    typer.echo(model_path())


@testbed_app.command()
def card(
    out: Annotated[Path | None, typer.Option(help="Also write the card as testbed.md, with its contact sheet, into this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps the sampled pictures; an interrupted run goes on from it.")] = Path("memhook-study"),
    per_source: Annotated[int, typer.Option(help="Clean test prompts of each of the four sources.")] = 100,
) -> None:
    """Show the evidence that the bundled model memorizes what it should and nothing else (about 15 minutes on 2 cores)."""
    from memhook.testbed.card import print_card

    print_card(work, out=out, per_source=per_source)
