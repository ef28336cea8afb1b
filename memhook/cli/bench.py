"""Printing what `memhook.bench` measures."""

from __future__ import annotations

import torch

from memhook.bench.capture import capture_rows, random_pipeline
from memhook.bench.gradients import gradient_costs, ratios
from memhook.cli.tables import console, print_table


def run_capture_bench(*, rounds: int, images: int, steps: int, large: bool, device: str) -> None:
    """Overhead of watching on the bundled model, and on a random UNet of 50 million parameters."""
    from memhook import testbed

    pipelines = [testbed.load_pipeline(), *([random_pipeline()] if large else [])]
    with console.status("running watched and unwatched, by turns"):
        rows = [row for pipeline in pipelines for row in capture_rows(pipeline.to(device), images=images, steps=steps, rounds=rounds)]
    print_table(
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
    console.print("Bytes, reads into Python and CUDA synchronizations are per evaluation; reads and synchronizations beyond the unwatched run.")


def run_gradients_bench(*, updates: int, repeats: int) -> None:
    """Cost of attribution and optimization on the bundled model's denoiser."""
    from memhook import testbed

    pipeline = testbed.load_pipeline()
    generator = torch.Generator().manual_seed(0)
    embeddings = []
    for prompt in ("a fox on a green poster", ""):
        ids = pipeline.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            embeddings.append(pipeline.text_encoder(ids).last_hidden_state.repeat(4, 1, 1))
    sample = torch.randn(4, 4, 16, 16, generator=generator)
    cond, uncond = embeddings
    costs = gradient_costs(pipeline.unet, sample=sample, timestep=981, cond=cond, uncond=uncond, updates=updates, repeats=repeats)
    print_table(
        f"What gradients cost on the bundled model, 4 samples, {updates} updates",
        [("way", ""), ("conditional forwards", "right"), ("saved activations", "right"), ("seconds", "right")],
        [(row.way, f"{row.forwards:.2f}", f"{row.saved_bytes / 2**20:.1f} MiB", f"{row.seconds:.3f}") for row in costs],
    )
    for name, value in ratios(costs).items():
        console.print(f"{name}: {value:.2f}", highlight=False)
