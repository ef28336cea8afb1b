"""The conformance suite for adapters: as a pytest class to subclass, and as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memhook.testing import checks
from memhook.testing.checks import CHECKS, Case, Run, applies

if TYPE_CHECKING:
    from collections.abc import Callable

    from memhook.hookspecs import Adapter


def check_adapter(
    target: object,
    run: Run,
    *,
    evaluations: int,
    adapter: Callable[[object], Adapter] | None = None,
    replayable: bool = True,
    imports: tuple[str, str] | None = None,
) -> list[str]:
    """Try an adapter on a small instance of its host; raises at the first check that fails.

    Args:
        target: What is watched.
        run: ``run(prompts, guided=True) -> Tensor`` runs the host's sampler once: one sample per prompt, all from the same
            initial noise. The empty prompt must be conditioned exactly like the unconditional branch.
        evaluations: How many guided evaluations one guided run makes.
        adapter: Makes the adapter for a target; None to have it found through its entry point.
        replayable: Whether evaluations of this host can be replayed.
        imports: ``(adapter's module, host's module)``; importing the first must not import the second.

    Returns:
        The names of the checks that passed.

    Raises:
        AssertionError: A check failed; says what was seen, what was expected, and the usual cause.

    >>> import torch, memhook
    >>> from memhook.testing import check_adapter, sample, tiny_unet
    >>> unet, words = tiny_unet(), {"": 0.0, "a lighthouse at dusk": 1.0, "two red apples": -1.0}
    >>> def run(prompts, *, guided=True):
    ...     cond = torch.stack([torch.full((5, 6), words[prompt]) for prompt in prompts])
    ...     noise = torch.ones(len(prompts), 4, 8, 8)
    ...     return sample(unet, steps=2, cond=cond, uncond=torch.zeros_like(cond), noise=noise, guidance_scale=7.5 if guided else 1.0)
    >>> passed = check_adapter(unet, run, evaluations=2, adapter=lambda unet: memhook.ModuleAdapter(unet, layout="uncond_first"))
    >>> "uncond_replay_is_zero" in passed
    True
    """
    case = Case(target, run, evaluations, adapter=adapter, replayable=replayable, imports=imports)
    passed = []
    for check in CHECKS:
        if applies(check, case):
            check(case)
            passed.append(check.__name__)
    return passed


class AdapterConformance:
    """The suite as a pytest class: subclass it, and give the fixtures ``target`` and ``run``.

    The class attributes say what `check_adapter` takes as arguments::

        class TestMyAdapter(AdapterConformance):
            evaluations = 4
            imports = ("my_adapter", "my_host")

            @pytest.fixture
            def target(self):
                return my_host.Sampler(...)

            @pytest.fixture
            def run(self, target):
                return lambda prompts, guided=True: target.sample(prompts, scale=7.5 if guided else 1.0, seed=0)
    """

    evaluations: ClassVar[int]
    replayable: ClassVar[bool] = True
    imports: ClassVar[tuple[str, str] | None] = None

    def make_adapter(self, target: object) -> Adapter | None:  # noqa: ARG002 -- to be overridden
        """The adapter for ``target``; None to have it found through its entry point."""
        return None

    def _check(self, check: Callable[[Case], None], target: object, run: Run) -> None:
        adapter: Any = self.make_adapter if self.make_adapter(target) is not None else None
        case = Case(target, run, self.evaluations, adapter=adapter, replayable=self.replayable, imports=self.imports)
        if applies(check, case):
            check(case)

    def test_outputs_identical(self, target: object, run: Run) -> None:
        self._check(checks.outputs_identical, target, run)

    def test_nothing_left_behind(self, target: object, run: Run) -> None:
        self._check(checks.nothing_left_behind, target, run)

    def test_evaluations_counted(self, target: object, run: Run) -> None:
        self._check(checks.evaluations_counted, target, run)

    def test_watches_agree(self, target: object, run: Run) -> None:
        self._check(checks.watches_agree, target, run)

    def test_other_threads_ignored(self, target: object, run: Run) -> None:
        self._check(checks.other_threads_ignored, target, run)

    def test_batch_is_its_samples(self, target: object, run: Run) -> None:
        self._check(checks.batch_is_its_samples, target, run)

    def test_no_guidance_is_missing(self, target: object, run: Run) -> None:
        self._check(checks.no_guidance_is_missing, target, run)

    def test_import_is_light(self, target: object, run: Run) -> None:
        self._check(checks.import_is_light, target, run)

    def test_replay_reproduces(self, target: object, run: Run) -> None:
        self._check(checks.replay_reproduces, target, run)

    def test_uncond_replay_is_zero(self, target: object, run: Run) -> None:
        self._check(checks.uncond_replay_is_zero, target, run)

    def test_gradient_reaches_embedding(self, target: object, run: Run) -> None:
        self._check(checks.gradient_reaches_embedding, target, run)

    def test_replay_refused(self, target: object, run: Run) -> None:
        self._check(checks.replay_refused, target, run)
