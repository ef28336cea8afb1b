"""How a benchmark or a command runs prompts: the model and everything that a calibration depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook_diffusers.prompts import PromptRun

IMAGES = 4
"""Images a prompt, where neither the user nor a calibration says how many."""


@dataclass(frozen=True)
class Sampling:
    """How prompts are run: the model and everything that a calibration depends on."""

    model: str | None
    images: int | None
    steps: int
    guidance_scale: float
    device: str
    dtype: str
    seed: int
    batch_size: int

    def check(self) -> None:
        """Refuse settings under which there is nothing to measure."""
        if self.guidance_scale <= 1:
            raise MemhookError(
                f"guidance_scale is {self.guidance_scale:g}; without guidance there is no unconditional prediction "
                "to compare with. Use a scale above 1, such as 7.5"
            )
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MemhookError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.images is not None and self.images < 1:
            raise MemhookError(f"images is {self.images}; expected 1 or more")

    def load(self) -> Any:
        """The pipeline: the bundled one where no model is named."""
        from memhook import testbed
        from memhook_diffusers.loading import load_pipeline

        return testbed.load_pipeline() if self.model is None else load_pipeline(self.model, dtype=self.dtype, device=self.device)

    def run(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        start: int = 0,
        evaluations: int | None = None,
        previews: Sequence[int] = (),
        score: Any = None,
    ) -> Iterator[PromptRun]:
        """Watch the prompts, batch by batch; ``start`` is the number of the first prompt (its seeds), ``score`` as in `watch`."""
        from memhook_diffusers.prompts import run_prompts

        return run_prompts(
            pipeline, prompts, images_per_prompt=self.images or IMAGES, steps=self.steps, guidance_scale=self.guidance_scale,
            seed=self.seed + 1000 * start, evaluations=evaluations, batch_size=self.batch_size, previews=previews,
            score=score,
        )  # fmt: skip

    def generate(self, pipeline: Any, prompt: str, *, images: int) -> list[Any]:
        """Pictures of one prompt, each with a seed of its own: the same ones whenever it is called."""
        import torch

        generators = [torch.Generator().manual_seed(self.seed + image) for image in range(images)]
        options = {"num_images_per_prompt": images, "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        return list(pipeline(prompt=prompt, generator=generators, **options).images)
