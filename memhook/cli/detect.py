"""``memhook detect``: score prompts on any diffusers pipeline."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from memhook.bench.sampling import IMAGES, Sampling
from memhook.capture.prompts import per_prompt
from memhook.capture.scoring import MAGNITUDE, as_scored
from memhook.cli.journal import Journal
from memhook.cli.verdicts import Verdict, check_format, json_lines, write_verdicts
from memhook.detection.calibration import Calibration
from memhook.detection.discovery import PValueCounts
from memhook.detection.named import score_for
from memhook.detection.verdict import detect
from memhook.errors import MemhookError
from memhook.report.progress import tracked
from memhook.report.tables import console, number, print_table, shown, verdict

if TYPE_CHECKING:
    from memhook.capture.scoring import Scored
    from memhook.detection.prompt_files import PromptRow

_WITHOUT_CALIBRATION = 10  # evaluations to score where no calibration says how many
_TABLE = 100  # prompts; longer lists go to a file


@dataclass(frozen=True)
class Decision:
    """How prompts are judged.

    Attributes:
        calibration: The calibration file; the bundled one for the bundled model where None.
        fpr: False-positive rate of each prompt by itself.
        fdr: Where given, a false discovery rate over all prompts of the run decides instead.
        accept: Settings that may differ from the calibration's.
        score: The score to judge by; the calibration's where None, and the magnitude without one.
    """

    calibration: Path | None
    fpr: float
    fdr: float | None = None
    accept: tuple[str, ...] = ()
    score: str | None = None

    def load(self, sampling: Sampling) -> Calibration | None:
        """The calibration, checked for its number of prompts before anything runs; None where there is none."""
        from memhook import testbed

        bundled = sampling.model is None and self.score in (None, MAGNITUDE)
        file = self.calibration if self.calibration is not None else testbed.calibration_path() if bundled else None
        if file is None:
            if self.fdr is not None or self.accept:
                raise MemhookError("--fdr and --accept-mismatch need a calibration; make one with `memhook calibrate`")
            return None
        known = Calibration.load(file).accepting(*self.accept)
        if self.fdr is None:
            known.threshold(self.fpr)
        else:
            PValueCounts().threshold(self.fdr)  # refuses what is no rate
        self.scored(known)
        return known

    def scored(self, known: Calibration | None) -> Scored:
        """The score to compute; an error where it is not the calibration's."""
        return score_for(known, self.score) if known is not None else as_scored(self.score if self.score is not None else MAGNITUDE)


def verdicts(rows: Sequence[PromptRow], sampling: Sampling, known: Calibration | None, decision: Decision, *, start: int = 0) -> Iterator[Verdict]:
    """Run the prompts in batches and judge each; ``start`` of them were judged before."""
    first = known.first if known is not None else min(sampling.steps, _WITHOUT_CALIBRATION)
    images = sampling.images or IMAGES
    waiting = iter(rows[start:])
    if start == len(rows):
        return
    scored = decision.scored(known)
    for run in sampling.run(sampling.load(), [row.prompt or "" for row in rows[start:]], start=start, evaluations=first, score=scored):
        for position, prompt in enumerate(run.prompts):
            part = run.trace.samples(slice(position * images, (position + 1) * images))
            line = next(waiting).line
            magnitudes, there = per_prompt(part.scores[scored.name], np.zeros(images, int))[0], part.has_score(scored.name)
            begin = float(magnitudes[there][0])
            if known is None:
                yield Verdict(line, prompt, begin, float(np.mean(magnitudes[there])), None, None)
                continue
            found = detect(part, known, fpr=decision.fpr if decision.fdr is None else 0.5)
            memorized = None if found.undecided[0] or decision.fdr is not None else bool(found.memorized[0])
            accepted = "; ".join(found.accepted_mismatches) or None
            yield Verdict(line, prompt, begin, float(found.scores[0]), float(found.p_values[0]), memorized, accepted)


def run_detect(rows: Sequence[PromptRow], sampling: Sampling, decision: Decision, *, out: str | None, fail_on_flag: bool) -> int:
    """Judge the prompts, print or write the result, and give the exit status."""
    sampling.check()
    if out is not None:
        check_format(out)
    known = decision.load(sampling)
    if sampling.images is None and known is not None:
        sampling = replace(sampling, images=int(known.setting.get("images_per_prompt", IMAGES)))
    bad = [row for row in rows if row.prompt is None]
    for row in bad:
        print(f"memhook: line {row.line} left out: {row.problem}", file=sys.stderr)
    usable = [row for row in rows if row.prompt is not None]
    journal = _journal(usable, sampling, known, decision, out) if out is not None and out != "-" else None
    found = _judged(usable, sampling, known, decision, journal)
    if decision.fdr is not None:
        found = discovered(found, decision.fdr)
    if out == "-":
        sys.stdout.write(json_lines(found, bad))
    else:
        if out is not None and journal is not None:
            write_verdicts(Path(out), found, bad)
            journal.close()
        _print(found, known, decision, images=sampling.images or IMAGES)
    return 1 if fail_on_flag and any(row.memorized for row in found) else 0


def _judged(rows: Sequence[PromptRow], sampling: Sampling, known: Calibration | None, decision: Decision, journal: Journal | None) -> list[Verdict]:
    """All verdicts; with a journal, those of an interrupted run are taken over, and new ones written down as they come."""
    if journal is None:
        return list(tracked(verdicts(rows, sampling, known, decision), total=len(rows), doing="watching prompts"))
    earlier = journal.read()
    if earlier:
        print(f"memhook: going on after {len(earlier)} prompts of {journal.path}", file=sys.stderr)
    coming = journal.recorded(verdicts(rows, sampling, known, decision, start=len(earlier)), earlier)
    return [*earlier, *tracked(coming, total=len(rows) - len(earlier), doing="watching prompts")]


def _journal(rows: Sequence[PromptRow], sampling: Sampling, known: Calibration | None, decision: Decision, out: str) -> Journal:
    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    settings: dict[str, Any] = {key: value for key, value in vars(sampling).items() if key != "batch_size"}
    settings |= {"fpr": decision.fpr, "fdr": decision.fdr, "accept": list(decision.accept), "score": decision.score}
    settings["prompts"] = digest(*((row.prompt or "").encode() for row in rows))
    settings["calibration"] = None if known is None else digest(known.magnitudes.tobytes(), repr(known.first).encode())
    return Journal(Path(out), settings)


def discovered(found: Sequence[Verdict], rate: float) -> list[Verdict]:
    """The verdicts with the decisions of the Benjamini-Hochberg procedure over all of them."""
    counts = PValueCounts([row.p_value for row in found if row.p_value is not None and np.isfinite(row.p_value)])
    largest = counts.threshold(rate)
    limit = largest if largest is not None else 0.0
    return [row if row.p_value is None or not np.isfinite(row.p_value) else replace(row, memorized=row.p_value <= limit) for row in found]


def _print(found: Sequence[Verdict], known: Calibration | None, decision: Decision, *, images: int) -> None:
    first = _WITHOUT_CALIBRATION if known is None else known.first
    over = "all evaluations" if first is None else f"first {first}"
    rows = [
        (
            shown(row.prompt),
            _number(row.first_evaluation),
            _number(row.score),
            "-" if row.p_value is None else number(row.p_value, 2),
            Text("not calibrated", style="yellow") if known is None else verdict(bool(row.memorized), row.memorized is None),
        )
        for row in found[:_TABLE]
    ]
    name = decision.scored(known).name
    what = "Magnitude of the text-conditional prediction" if name == MAGNITUDE else f"Score {name}"
    print_table(
        f"{what}, {images} images a prompt",
        [("prompt", ""), ("first evaluation", "right"), (over, "right"), ("p-value", "right"), ("verdict", "")],
        rows,
    )
    if len(found) > _TABLE:
        console.print(f"{len(found) - _TABLE} more prompts are not shown; use --out to write all of them.")
    if known is None:
        console.print(
            f"Without a calibration a {name} has no p-value: larger is more memorized, but how large is normal "
            "depends on the model and the sampler. Make one with `memhook calibrate`."
        )
        return
    flagged = sum(row.memorized is True for row in found)
    if decision.fdr is None:
        rate = f"at a false-positive rate of {decision.fpr:g}"
    else:
        rate = f"at a false discovery rate of {decision.fdr:g} over all of them (Benjamini-Hochberg)"
    console.print(
        f"{flagged} of {len(found)} prompts flagged {rate}, calibrated on {len(known)} clean prompts. "
        "The p-value is the chance of a score this high if the prompt is not memorized."
    )
    for message in sorted({row.accepted_mismatches for row in found if row.accepted_mismatches}):
        console.print(f"Accepted, so that p-values may be wrong: {message}", style="yellow", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)
