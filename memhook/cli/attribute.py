"""``memhook attribute``: which words make a prompt pull so hard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from memhook.attribution.gradient import TokenAttribution, attribute_tokens
from memhook.attribution.tokens import prompt_tokens
from memhook.capture.watching import probe
from memhook.errors import MemhookError
from memhook.files import replace_file, write_text
from memhook.report.tables import console

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling

_ENDINGS = (".html", ".png", ".json")


def attribute_prompt(prompt: str, sampling: Sampling, *, evaluations: int) -> TokenAttribution:
    """Run the sampler for its first evaluations and score the prompt's words."""
    if not prompt.strip():
        raise MemhookError("the prompt is empty, so it has no words to score; give it some text")
    sampling.check()
    pipeline = sampling.load()
    trace = probe(pipeline, lambda: sampling.generate(pipeline, prompt, images=sampling.images or 4), evaluations=evaluations)
    tokenizer = getattr(pipeline, "tokenizer", None)
    length = next((evaluation.embedding.shape[1] for evaluation in trace.evaluations if evaluation.embedding is not None), None)
    tokens = prompt_tokens(tokenizer, prompt, length=length) if tokenizer is not None else None
    return attribute_tokens(trace, tokens=tokens)


def run_attribute(prompt: str, sampling: Sampling, *, evaluations: int, out: Path | None) -> None:
    """Print the words with their scores, and write them where asked."""
    if out is not None and out.suffix not in _ENDINGS:
        raise MemhookError(f"{out} ends in {out.suffix or 'nothing'}; expected {', '.join(_ENDINGS)}")
    attribution = attribute_prompt(prompt, sampling, evaluations=evaluations)
    console.print(attribution)
    if out is None:
        return
    if out.suffix == ".html":
        body = attribution._repr_html_()
        write_text(out, f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>memhook attribute</title><body>{body}</body></html>\n')
    elif out.suffix == ".json":
        write_text(out, json.dumps(attribution.to_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        attribution.plot(ax=figure.subplots())
        replace_file(out, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    console.print(f"wrote {out}", soft_wrap=True)
