"""``memhook bench capture``: what watching costs, against not watching and against the naive way, in the same run."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memhook.capture.trace import Trace
from memhook.capture.watching import watch


@dataclass(frozen=True)
class CaptureRow:
    """One way of watching on one model.

    Attributes:
        model: Which model, with its size.
        way: ``"memhook.watch"`` or ``"naive"`` (a norm read per picture and step, latents kept on the host).
        ratio: Median over rounds of the time with watching over the time without, each pair run back to back.
        spread: Lowest and highest of these ratios.
        kept_bytes: Bytes of tensors kept per evaluation.
        host_reads: Numbers that were read off the device per evaluation: each waits for it.
        synchronizations: What CUDA reported per evaluation beyond the unwatched run; None without a GPU.
    """

    model: str
    way: str
    ratio: float
    spread: tuple[float, float]
    kept_bytes: float
    host_reads: float
    synchronizations: float | None


class _CountReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read a value of a tensor into Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


class _Naive:
    """The usual way: one ``.item()`` a picture and step, and the latents of every step on the host."""

    def __init__(self, pipeline: Any) -> None:
        self._unet = pipeline.unet
        self.norms: list[float] = []
        self.kept: list[Tensor] = []

    @contextmanager
    def __call__(self) -> Iterator[_Naive]:
        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            uncond, cond = output[0].chunk(2)
            self.norms += [(c - u).norm().item() for c, u in zip(cond, uncond, strict=True)]
            self.kept.append(args[0].chunk(2)[0].cpu().clone())

        handle = self._unet.register_forward_hook(hook)
        try:
            yield self
        finally:
            handle.remove()


def random_pipeline(*, width: int = 216, size: int = 16) -> Any:
    """A Stable Diffusion pipeline around a random UNet of about 50 million parameters, with the bundled model's other parts.

    Args:
        width: Channels of the first block; 216 for 50 million parameters.
        size: Height and width of the latents. Small ones make the rest of a step, and so what watching costs, weigh more.
    """
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from memhook import testbed

    bundled = testbed.load_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=size,
            block_out_channels=(width, 2 * width),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    parts = {**bundled.components, "unet": unet.eval()}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def capture_rows(pipeline: Any, *, images: int, steps: int, rounds: int) -> list[CaptureRow]:
    """Time a pipeline unwatched and watched, in turns, and count what watching keeps and reads.

    Args:
        pipeline: A text-to-image pipeline with a ``unet``.
        images: Images in a batch.
        steps: Steps of a run.
        rounds: Pairs of runs per way.
    """
    size = sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6
    device = next(pipeline.unet.parameters()).device

    def run() -> None:
        pipeline("a fox on a green poster", num_images_per_prompt=images, num_inference_steps=steps, output_type="latent")
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(way: Callable[[], AbstractContextManager[Any]]) -> float:
        with way():
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

    run()  # warm
    found = []

    def naive() -> AbstractContextManager[_Naive]:  # a fresh one each time: it keeps what it saw
        return _Naive(pipeline)()

    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"memhook.watch": lambda: watch(pipeline), "naive": naive}
    unwatched_reads, unwatched_syncs = _count(run, nullcontext, device)
    for name, way in ways.items():
        ratios = []
        for number in range(rounds):
            order = (nullcontext, way) if number % 2 == 0 else (way, nullcontext)
            times = {step is way: seconds(step) for step in order}
            ratios.append(times[True] / times[False])
        reads, syncs = _count(run, way, device)
        with way() as kept:
            run()
        found.append(
            CaptureRow(
                f"{size:.0f} M parameters, batch {images}",
                name,
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                _kept_bytes(kept) / steps,
                (reads - unwatched_reads) / steps,
                None if syncs is None or unwatched_syncs is None else (syncs - unwatched_syncs) / steps,
            )
        )
    return found


def _count(run: Callable[[], None], way: Callable[[], AbstractContextManager[Any]], device: torch.device) -> tuple[int, int | None]:
    """Reads of values into Python during one run, and CUDA's own count of synchronizations."""
    with way(), _CountReads() as counted:
        run()
    if device.type != "cuda":
        return counted.count, None
    with warnings.catch_warnings(record=True) as seen, way():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counted.count, sum("synchroniz" in str(warning.message) for warning in seen)


def _kept_bytes(kept: Any) -> int:
    """Bytes of all tensors that can be reached from what a way of watching left behind."""
    tensors = _reachable_tensors(vars(kept)["_rows"] if isinstance(kept, Trace) else kept.kept)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + (0 if isinstance(kept, Trace) else 8 * len(kept.norms))


def _reachable_tensors(root: Any) -> list[Tensor]:
    found, seen, waiting = [], set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, torch.nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, FunctionType):  # what it closes over, not the module that it stands in
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
        else:
            waiting += gc.get_referents(item)
    return found
