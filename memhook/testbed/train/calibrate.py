"""Stage 5: the calibration that ships with the model."""

from pathlib import Path

from memhook.detection.calibration import calibrate
from memhook.testbed.bundle import GUIDANCE_SCALE, STEPS, read_clean
from memhook_diffusers.loading import load_pipeline
from memhook_diffusers.prompts import run_prompts

IMAGES = 4
EVALUATIONS = 10  # of 50 are kept: the paper's "first 10 steps"
SCORED = 3  # of these the score averages; later ones grow for clean prompts too on this model (see its card)
SEED = 10_000_000  # far from the seeds of demo and benchmarks


def calibrate_model(folder: Path, *, batch_size: int = 16) -> None:
    """Calibrate on the clean prompts of the calibration split and write ``calibration.safetensors`` into the model's folder."""
    prompts = [row.prompt for row in read_clean(folder) if row.split == "calibration"]
    pipeline = load_pipeline(str(folder))
    runs = run_prompts(
        pipeline,
        prompts,
        images_per_prompt=IMAGES,
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=SEED,
        evaluations=EVALUATIONS,
        batch_size=batch_size,
    )
    traces = []
    for run in runs:
        traces.append(run.trace)
        print(f"calibrated {sum(len(set(trace.groups)) for trace in traces)} of {len(prompts)} prompts", flush=True)
    calibrate(traces, first=SCORED).save(folder / "calibration.safetensors")
