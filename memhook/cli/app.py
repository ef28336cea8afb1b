"""The commands and their options; what they do is in the modules beside this one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="memhook",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is this diffusion model about to hand me a copy of its training data, because of which words, and how do I stop it?",
)
testbed_app = typer.Typer(no_args_is_help=True, help="The bundled model that really memorizes.")
bench_app = typer.Typer(no_args_is_help=True, help="Measured results, printed by the run that measured them.")
calibration_app = typer.Typer(no_args_is_help=True, help="Calibration files.")
app.add_typer(calibration_app, name="calibration")
app.add_typer(testbed_app, name="testbed")
app.add_typer(bench_app, name="bench")


class Action(str, Enum):
    """What a guard does with a flagged prompt."""

    MITIGATE = "mitigate"
    STOP = "stop"
    WARN = "warn"


Seed = Annotated[int, typer.Option(help="Seed of the first image; every image has its own.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page index.html.")] = Path("memhook-demo"),
    seed: Seed = 1,
) -> None:
    """Watch the bundled model on memorized and fresh prompts; print a table and write one HTML page."""
    from memhook.cli.demo import run_demo

    run_demo(out, seed=seed)


Model = Annotated[str | None, typer.Option(help="Folder or hub id of any diffusers text-to-image pipeline; the bundled model by default.")]
Steps = Annotated[int, typer.Option(help="Steps of the sampler.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance scale, above 1.")]
Device = Annotated[str, typer.Option(help="Device, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
BatchSize = Annotated[int, typer.Option(help="Prompts that run together.")]


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
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
) -> None:
    """Say for each prompt whether the model seems to have memorized a picture for it."""
    from memhook.cli.detect import Decision, run_detect
    from memhook.cli.sampling import Sampling
    from memhook.prompt_files import PromptRow, read_prompts

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt (once or more) or --prompts FILE")
    rows = [PromptRow(number, text) for number, text in enumerate(prompt or [], 1)] if prompts is None else read_prompts(prompts)
    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size)
    decision = Decision(calibration, fpr, fdr, tuple(accept_mismatch or ()))
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
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the first image; take another one than for detection.")] = 1_000_000,
    batch_size: BatchSize = 8,
) -> None:
    """Make a calibration file from prompts known not to be memorized (99 or more for a false-positive rate of 1%)."""
    from memhook.cli.calibrate import run_calibrate
    from memhook.cli.sampling import Sampling
    from memhook.prompt_files import read_prompts

    run_calibrate(read_prompts(prompts), Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size), first=first, out=out)


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
    from memhook.cli.attribute import run_attribute
    from memhook.cli.sampling import Sampling

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
    from memhook.cli.generate import run_generate
    from memhook.cli.sampling import Sampling

    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, 1)
    status = run_generate(prompt, sampling, calibration=calibration, action=action.value, fpr=fpr, decide_after=decide_after, target=target, out=out)
    raise typer.Exit(status)


@app.command()
def adapters() -> None:
    """List the installed adapters, where they come from, and whether they are in use."""
    from memhook.cli.tables import print_adapters

    print_adapters()


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


@bench_app.command("detection")
def bench_detection(
    model: Model = None,
    memorized: Annotated[str | None, typer.Option(help="File of memorized prompts for another model (JSON lines may name a family).")] = None,
    clean: Annotated[str | None, typer.Option(help="File of prompts that are not memorized.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write detection.csv, detection.json and the two figures into this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps what was sampled; an interrupted run goes on from it.")] = Path("memhook-study"),
    per_source: Annotated[int, typer.Option(help="Clean test prompts of each of the bundled model's four sources.")] = 100,
    images: Annotated[int, typer.Option(help="Images of each prompt; detectors see 1, 4, 16, 32 of them as far as there are so many.")] = 4,
    descriptor: Annotated[
        Path | None, typer.Option(help="TorchScript file of an image descriptor such as SSCD, run as code: only from a source you trust.")
    ] = None,
    timed: Annotated[int, typer.Option(help="Prompts on which each detector is timed; 0 for none.")] = 3,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    readme: Annotated[Path | None, typer.Option(help="Replace the table between the markers in this file.")] = None,
) -> None:
    """The paper's Table 1: magnitude and density baselines on known prompts (bundled model: about 15 minutes on 2 cores)."""
    from memhook.bench.detection.report import Options, run_detection_bench
    from memhook.cli.sampling import Sampling

    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size)
    options = Options(work, memorized, clean, per_source, descriptor, timed, out, readme)
    run_detection_bench(sampling, options)


Page = Annotated[Path | None, typer.Option(help="Replace the part between this benchmark's markers in this file.")]


@bench_app.command("capture")
def bench_capture(
    rounds: Annotated[int, typer.Option(help="Pairs of runs, without and with watching, per way and model.")] = 7,
    images: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 10,
    large: Annotated[bool, typer.Option(help="Also a random UNet of 50 million parameters.")] = True,
    device: Device = "cpu",
    page: Page = None,
) -> None:
    """What watching costs in time, bytes kept and waits, beside the naive way (ten minutes and more on 2 cores; less with --no-large)."""
    from memhook.cli.bench import run_capture_bench

    run_capture_bench(rounds=rounds, images=images, steps=steps, large=large, device=device, page=page)


@bench_app.command("gradients")
def bench_gradients(
    updates: Annotated[int, typer.Option(help="Updates of an optimization.")] = 10,
    repeats: Annotated[int, typer.Option(help="Repetitions of each way; the median is shown.")] = 3,
    samples: Annotated[int, typer.Option(help="Samples in a batch.")] = 4,
    large: Annotated[bool, typer.Option(help="Also a random UNet of 50 million parameters.")] = True,
    page: Page = None,
) -> None:
    """What gradients cost: in forward passes, bytes and seconds, beside the naive way (about 2 minutes on 2 cores)."""
    from memhook.cli.bench import run_gradients_bench

    run_gradients_bench(updates=updates, repeats=repeats, samples=samples, large=large, page=page)


BenchOut = Annotated[Path | None, typer.Option(help="Also write CSV, JSON and pictures into this folder.")]


@bench_app.command("attribution")
def bench_attribution(
    out: BenchOut = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps what was measured; an interrupted run goes on from it.")] = Path(
        "memhook-attribution"
    ),
    prompts: Annotated[int | None, typer.Option(help="Planted prompts, evenly from the 96; all by default.")] = None,
    images: Annotated[int, typer.Option(help="Pictures a prompt, where words are exchanged.")] = 1,
    scored: Annotated[int, typer.Option(help="Images a prompt that scores are averaged over.")] = 4,
    steps: Steps = 25,
    page: Page = None,
) -> None:
    """How often planted trigger words score highest, and what exchanging the top words does to the copy (about 5 minutes on 2 cores)."""
    from memhook.bench.attribution_report import run_attribution_bench

    run_attribution_bench(work=work, out=out, prompts=prompts, images=images, scored=scored, steps=steps, page=page)


@bench_app.command("mitigation")
def bench_mitigation(
    out: BenchOut = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps the pictures; an interrupted run goes on from it.")] = Path("memhook-mitigation"),
    verbatim: Annotated[int | None, typer.Option(help="Verbatim prompts, evenly from the 72.")] = 24,
    templates: Annotated[int | None, typer.Option(help="Template prompts, evenly from the 24.")] = 12,
    images: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    steps: Steps = 25,
    lr: Annotated[float, typer.Option(help="Learning rate of the optimization.")] = 0.05,
    updates: Annotated[int, typer.Option(help="Updates of an embedding at most.")] = 10,
    guarded: Annotated[int, typer.Option(help="Batches of four clean prompts and a memorized one that run under a guard; 0 for none.")] = 3,
    page: Page = None,
) -> None:
    """Similarity to the training picture against alignment with the prompt, beside the baselines (about 10 minutes on 2 cores)."""
    from memhook.bench.mitigation import Descent
    from memhook.bench.mitigation_report import run_mitigation_bench

    run_mitigation_bench(
        work=work,
        out=out,
        verbatim=verbatim,
        templates=templates,
        images=images,
        steps=steps,
        descent=Descent(lr=lr, max_steps=updates),
        guarded=guarded,
        page=page,
    )


@bench_app.command("training")
def bench_training(
    out: Annotated[Path | None, typer.Option(help="Also write training.csv, .json, .svg and training-dropped.csv into this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps every finished run; an interrupted benchmark goes on from it.")] = Path(
        "memhook-training"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each fine-tune.")] = 90,
    seeds: Annotated[int, typer.Option(help="Fine-tunes of each way, each with pairs of its own.")] = 3,
    planted: Annotated[int, typer.Option(help="New pairs that are shown again and again.")] = 4,
    tau: Annotated[list[float] | None, typer.Option(help="A threshold, in place of the three quantiles of clean pairs; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Pairs of steps that are timed.")] = 10,
    page: Page = None,
) -> None:
    """Fine-tune the bundled model with planted duplicates: no filter, the filter, random tokens (24 runs, about a minute each)."""
    from memhook.bench.training.recipe import Recipe
    from memhook.bench.training.report import run_training_bench

    run_training_bench(work, Recipe(steps=steps, planted=planted), seeds=seeds, taus=tau, rounds=rounds, out=out, page=page)
