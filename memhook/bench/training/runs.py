"""All ways and seeds, one after the other, each kept on disk once it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from memhook.adapting.fingerprint import fingerprint
from memhook.bench.training.finetune import Model, Steps, fine_tune, observe
from memhook.bench.training.judging import Judgment, judge, list_figures
from memhook.bench.training.overhead import Overhead, overhead
from memhook.bench.training.recipe import Data, Recipe, Way
from memhook.bench.training.signal import Signal, signal
from memhook.files import write_text
from memhook.testbed.bundle import load_pipeline
from memhook.training import FilterCalibration, FilterReport, KeyCount
from memhook.training.counts import ranked

Track = Callable[[Sequence[int], str], Iterator[int]]
_FORMAT = 2  # of the kept files; raise it when a run's meaning changes
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Run:
    """One way with one seed, and how it was judged."""

    way: Way
    seed: int
    judgment: Judgment


@dataclass(frozen=True)
class Results:
    """What the benchmark found.

    Attributes:
        recipe: Its sizes.
        start: The judgment of the model before any fine-tune, a seed each.
        runs: Way by way, seed by seed.
        overhead: What the filter costs.
        signal: What it sees of pairs that the model has memorized before.
        dropped: The first seed's most suspicious samples: way, place, key, judged, dropped, remembered, mean excess.
    """

    recipe: Recipe
    start: list[Judgment]
    runs: list[Run]
    overhead: Overhead
    signal: Signal
    dropped: list[dict[str, Any]]


def run_all(work: Path, recipe: Recipe, ways: Sequence[Way], *, seeds: int, rounds: int, track: Track) -> Results:
    """Fine-tune, judge and time, going on from what ``work`` holds."""
    model = Model(load_pipeline())
    kept = _Kept(work, [_FORMAT, asdict(recipe), fingerprint(model.pipeline.unet), fingerprint(model.pipeline.text_encoder)])
    path = work / f"{kept.name('calibration')}.safetensors"
    if not path.is_file():
        observe(model, recipe).save(path)
    calibration = FilterCalibration.load(path)
    start, runs, dropped = [], [], []
    for seed in range(seeds):
        data = Data(recipe, seed)
        start.append(Judgment(**kept(["start", seed], lambda data=data: asdict(judge(model, model.denoiser(), data)))))  # type: ignore[misc]
        for way in ways:

            def one(way: Way = way, data: Data = data) -> dict[str, Any]:
                return _one(model, recipe, way, data, calibration, lambda steps: track(steps, f"{way.name}, seed {data.seed + 1} of {seeds}"))

            found = kept(["run", asdict(way), seed], one)
            report = FilterReport(rows=ranked(KeyCount(*row) for row in found["rows"]))
            judgment = Judgment(**found["judgment"])
            runs.append(Run(way, seed, replace(judgment, **list_figures(report, *data.shown())) if way.filters else judgment))
            if seed == 0:
                dropped += [{"way": way.name, **row} for row in _first(report)]
    cost = Overhead(
        **kept(["overhead of steps", rounds, torch.get_num_threads()], lambda: asdict(overhead(model, recipe, calibration, rounds=rounds)))
    )
    known = Signal(**kept(["signal"], lambda: asdict(signal(model, recipe, calibration))))
    return Results(recipe, start, runs, cost, known, dropped)


def _one(
    model: Model, recipe: Recipe, way: Way, data: Data, calibration: FilterCalibration, track: Callable[[Sequence[int]], Iterator[int]]
) -> dict[str, Any]:
    torch.manual_seed(data.seed)
    steps = Steps(model, recipe, way, data, calibration)
    report = fine_tune(steps, track=track)
    return {"judgment": asdict(judge(model, steps.unet, data)), "rows": [list(asdict(row).values()) for row in report.rows] if report else []}


def _first(report: FilterReport, *, most: int = 20) -> list[dict[str, Any]]:
    return [
        {"place": place, "key": row.key, "judged": row.judged, "dropped": row.dropped, "remembered": row.remembered, "excess": round(row.excess, 4)}
        for place, row in enumerate(report.rows[:most], 1)
    ]  # fmt: skip


class _Kept:
    """Results as JSON files, named by all that they depend on."""

    def __init__(self, work: Path, setting: list[Any]) -> None:
        self._work, self._setting = work, setting
        work.mkdir(parents=True, exist_ok=True)

    def name(self, what: Any) -> str:
        return hashlib.sha256(json.dumps([self._setting, what], sort_keys=True).encode()).hexdigest()[:20]

    def __call__(self, what: Any, make: Callable[[], _Result]) -> _Result:
        path = self._work / f"{self.name(what)}.json"
        try:
            found: _Result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or damaged: made again
            found = make()
            write_text(path, json.dumps(found) + "\n")
        return found
