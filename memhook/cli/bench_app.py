"""The commands ``memhook bench ...`` and their options; what they do is in `memhook.bench` and the modules beside this one."""

from pathlib import Path
from typing import Annotated

import typer

from memhook.cli.options import BatchSize, Device, Dtype, GuidanceScale, Model, Seed, Steps

bench_app = typer.Typer(no_args_is_help=True, help="Measured results, printed by the run that measured them.")

Page = Annotated[Path | None, typer.Option(help="Replace the part between this benchmark's markers in this file.")]


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
    page: Page = None,
) -> None:
    """The paper's Table 1: magnitude and density baselines on known prompts (bundled model: about 15 minutes on 2 cores)."""
    from memhook.bench.detection.report import Options, run_detection_bench
    from memhook.bench.sampling import Sampling

    sampling = Sampling(model, images, steps, guidance_scale, device, dtype, seed, batch_size)
    options = Options(work, memorized, clean, per_source, descriptor, timed, out, page)
    run_detection_bench(sampling, options)


@bench_app.command("capture")
def bench_capture(
    rounds: Annotated[int, typer.Option(help="Pairs of runs, without and with watching, per way and model.")] = 7,
    images: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 10,
    large: Annotated[bool, typer.Option(help="Also a random UNet of 50 million parameters.")] = True,
    device: Device = "cpu",
    page: Page = None,
) -> None:
    """What watching costs in time, bytes kept and waits, beside the naive way (about 4 minutes on 2 cores)."""
    from memhook.cli.bench import run_capture_bench

    run_capture_bench(rounds=rounds, images=images, steps=steps, large=large, device=device, page=page)


@bench_app.command("startup")
def bench_startup(rounds: Annotated[int, typer.Option(help="Starts of each command.")] = 7, page: Page = None) -> None:
    """How long the command takes to answer, beside a bare Python and torch alone (about a minute on 2 cores)."""
    from memhook.cli.bench import run_startup_bench

    run_startup_bench(rounds=rounds, page=page)


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


TestbedModel = Annotated[
    Path | None,
    typer.Option(help="Folder of another model that `python -m memhook.testbed.train` wrote; its markers in a page hold the folder's name as well."),
]
BenchOut = Annotated[Path | None, typer.Option(help="Also write CSV, JSON and pictures into this folder.")]


@bench_app.command("attribution")
def bench_attribution(
    model: TestbedModel = None,
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

    run_attribution_bench(work=work, out=out, prompts=prompts, images=images, scored=scored, steps=steps, page=page, model=model)


@bench_app.command("mitigation")
def bench_mitigation(
    model: TestbedModel = None,
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
        model=model,
    )


@bench_app.command("whitening")
def bench_whitening(
    model: TestbedModel = None,
    out: BenchOut = None,
    per_source: Annotated[int, typer.Option(help="Clean test prompts of each of the bundled model's four sources.")] = 100,
    page: Page = None,
) -> None:
    """Detection at the first evaluation, with the magnitude and with the whitened one (about 2 minutes on 2 cores)."""
    from memhook.bench.whitening import run_whitening_bench

    run_whitening_bench(per_source=per_source, out=out, page=page, model=model)


@bench_app.command("training")
def bench_training(
    out: Annotated[Path | None, typer.Option(help="Also write training.csv, .json, .svg and training-dropped.csv into this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps every finished run; an interrupted benchmark goes on from it.")] = Path(
        "memhook-training"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each fine-tune.")] = 200,
    seeds: Annotated[int, typer.Option(help="Fine-tunes of each way, each with pairs of its own.")] = 3,
    planted: Annotated[int, typer.Option(help="New pairs that are shown again and again.")] = 6,
    tau: Annotated[list[float] | None, typer.Option(help="Also a filter with this number at every timestep; may be repeated.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only the way of this name, as in the table; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Pairs of steps that are timed.")] = 10,
    page: Page = None,
) -> None:
    """Fine-tune the bundled model with planted duplicates: no filter, the filter, random tokens (18 runs of about two minutes)."""
    from memhook.bench.training.recipe import Recipe
    from memhook.bench.training.report import run_training_bench

    run_training_bench(work, Recipe(steps=steps, planted=planted), seeds=seeds, taus=tau, rounds=rounds, out=out, page=page, names=way)
