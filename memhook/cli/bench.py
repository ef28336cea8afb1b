"""Printing what `memhook.bench` measures."""

from __future__ import annotations

from pathlib import Path

import torch

from memhook.bench.capture import capture_rows, random_pipeline
from memhook.bench.gradients import GOALS, gradient_costs, ratios
from memhook.bench.startup import startup_rows
from memhook.bench.written import Shown, read_page, write_page
from memhook.errors import MemhookError
from memhook.report.tables import console


def run_capture_bench(*, rounds: int, images: int, steps: int, large: bool, device: str, page: Path | None = None) -> None:
    """Overhead of watching on the bundled model, and on a random UNet of 50 million parameters."""
    from memhook import testbed

    if page is not None:
        read_page(page, "capture")  # before the long run: a wrong file is told at once
    pipelines = [testbed.load_pipeline(), *([random_pipeline(size=8)] if large else [])]
    with console.status("running watched and unwatched, by turns"):
        rows = [row for pipeline in pipelines for row in capture_rows(pipeline.to(device), images=images, steps=steps, rounds=rounds)]
    shown = Shown()
    shown.table(
        f"What watching costs ({rounds} pairs of runs of {steps} steps each)",
        [
            ("model", ""),
            ("way", ""),
            ("time / unwatched", "right"),
            ("lowest, highest", "right"),
            ("kept bytes", "right"),
            ("reads", "right"),
            ("syncs", "right"),
        ],
        [
            (
                row.model,
                row.way,
                f"{row.ratio:.3f}",
                f"{row.spread[0]:.3f}, {row.spread[1]:.3f}",
                f"{row.kept_bytes:,.0f}",
                f"{row.host_reads:.1f}",
                "no GPU" if row.synchronizations is None else f"{row.synchronizations:.1f}",
            )
            for row in rows
        ],
    )
    shown.text("Bytes, reads into Python and CUDA synchronizations are per evaluation; reads and synchronizations beyond the unwatched run.")
    if page is not None:
        write_page(page, "capture", shown)


def run_startup_bench(*, rounds: int, page: Path | None = None) -> None:
    """How long `import memhook` and the command take to answer."""
    if page is not None:
        read_page(page, "startup")
    with console.status("starting processes, by turns"):
        rows = startup_rows(rounds=rounds)
    shown = Shown()
    columns = [
        ("started", ""),
        ("seconds", "right"),
        ("time / bare Python", "right"),
        ("lowest, highest", "right"),
        ("modules", "right"),
        ("torch", ""),
    ]
    shown.table(
        f"How long it takes to start ({rounds} rounds)",
        columns,
        [
            (
                row.what,
                f"{row.seconds:.2f}",
                f"{row.ratio:.1f}",
                f"{row.spread[0]:.1f}, {row.spread[1]:.1f}",
                str(row.modules),
                "loaded" if row.torch else "not loaded",
            )
            for row in rows
        ],
    )
    shown.text("Each is a process of its own, from its start to its end; modules are those loaded at the end.")
    if page is not None:
        write_page(page, "startup", shown)


def run_gradients_bench(*, updates: int, repeats: int, samples: int, large: bool, page: Path | None = None) -> None:
    """Cost of attribution and optimization on the bundled model's denoiser, and on a random UNet of 50 million parameters."""
    from memhook import testbed

    if samples < 1:
        raise MemhookError(f"samples is {samples}; expected 1 or more")
    if page is not None:
        read_page(page, "gradients")
    pipeline = testbed.load_pipeline()
    embeddings = []
    for prompt in ("a fox on a green poster", ""):
        ids = pipeline.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            embeddings.append(pipeline.text_encoder(ids).last_hidden_state.repeat(samples, 1, 1))
    sample = torch.randn(samples, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = Shown()
    for denoiser in (pipeline.unet, *([random_pipeline().unet] if large else [])):
        size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
        cond, uncond = embeddings
        costs = gradient_costs(denoiser, sample=sample, timestep=981, cond=cond, uncond=uncond, updates=updates, repeats=repeats)
        shown.table(
            f"What gradients cost with {size:.0f} million parameters, {samples} samples, {updates} updates",
            [("way", ""), ("conditional forwards", "right"), ("saved activations", "right"), ("seconds", "right")],
            [(row.way, f"{row.forwards:.2f}", f"{row.saved_bytes / 2**20:.1f} MiB", f"{row.seconds:.3f}") for row in costs],
        )
        shown.table(
            f"The figures with a goal, {size:.0f} million parameters",
            [("figure", ""), ("measured", "right"), ("goal", "right")],
            [(name, f"{value:.2f}", f"{GOALS[name]:.2f}") for name, value in ratios(costs).items()],
        )
    if page is not None:
        write_page(page, "gradients", shown)
