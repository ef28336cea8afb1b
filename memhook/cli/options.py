"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="Folder or hub id of any diffusers text-to-image pipeline; the bundled model by default.")]
Score = Annotated[str | None, typer.Option("--score", help="Name of the score, as `memhook methods` lists them; the magnitude by default.")]
Steps = Annotated[int, typer.Option(help="Steps of the sampler.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance scale, above 1.")]
Device = Annotated[str, typer.Option(help="Device, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
BatchSize = Annotated[int, typer.Option(help="Prompts that run together.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; every image has its own.")]
