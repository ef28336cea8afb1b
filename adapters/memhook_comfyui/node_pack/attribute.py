"""The node that says which words do it."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from memhook import attribute_tokens
from memhook.errors import MemhookError

from . import inputs
from .host import CATEGORY, check_interrupted, progress, shown
from .pictures import bars
from .sampling import Conditioning, encode, probe
from .tokens import prompt_tokens


class AttributeTokens:
    """CLIP, text and MODEL in; words with their scores out."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Shows which words of a prompt pull the picture towards something memorized. Runs the start of a sampling by itself."
    RETURN_TYPES: ClassVar = ("IMAGE", "STRING")
    RETURN_NAMES: ClassVar = ("chart", "text")
    FUNCTION = "attribute"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that makes the pictures."}),
                "clip": ("CLIP", {"tooltip": "The text encoder of your prompt."}),
                "text": ("STRING", {"multiline": True, "tooltip": "The prompt to look into."}),
                "negative": inputs.negative(),
                "latent": ("LATENT", {"tooltip": "An empty latent of the size and number of your pictures."}),
                **inputs.sampler_inputs(),
                "evaluations": (
                    "INT",
                    {"default": 1, "min": 1, "max": 1000, "tooltip": "How many steps to average over. The first one says the most."},
                ),
            }
        }

    def attribute(
        self, model: Any, clip: Any, text: str, negative: Conditioning, latent: dict[str, Any], evaluations: int, **sampler: Any
    ) -> dict[str, Any]:
        """Probe, differentiate, and draw."""
        positive = encode(clip, text)
        if len(positive) != 1:
            raise MemhookError(f"the text encoder gave {len(positive)} conditionings for one prompt; leave scheduled hooks off this CLIP")
        trace, alive = probe(model, positive, negative, latent, evaluations=evaluations, **sampler)
        found = [evaluation for evaluation in trace.evaluations if evaluation.pred_uncond is not None and evaluation.embedding is not None]
        if not found:
            trace.magnitudes  # noqa: B018 -- raises, with ComfyUI's reason
            raise MemhookError("this model is given no text embedding (b, l, d), so its words cannot be scored")
        bar, embedding = progress(len(found)), found[0].embedding

        def ticking(objective: Any) -> Any:
            def watched(embedding: Any) -> Any:
                check_interrupted()
                value = objective(embedding)
                bar.update(1)
                return value

            return watched

        length = embedding.shape[1] if embedding is not None else 0
        tokens = prompt_tokens(clip, text, length)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt without words has no bars, which shows
            result = attribute_tokens([ticking(evaluation.objective) for evaluation in found], embedding, tokens=tokens)
        del alive
        words = result.words[0]
        title = f"Which words pull: {len(found)} evaluation{'s' * (len(found) != 1)}, {latent['samples'].shape[0]} pictures"
        return shown(str(result), bars([(word.text, word.score) for word in words], title=title), "memhook_words")
