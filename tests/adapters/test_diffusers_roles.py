"""Roles from arithmetic: every formula is told, in either order, and what cannot be told is not guessed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memhook.adapting.pairs import Prediction
from memhook_diffusers.evidence import observe
from memhook_diffusers.outputs import Reader, readers
from memhook_diffusers.roles import decide

B, SHAPE = 2, (4, 6, 6)
PRIOR = (0, 1)  # taken where nothing else can tell


def randn(seed, *shape):
    return torch.randn(*(shape or (B, *SHAPE)), generator=torch.Generator().manual_seed(seed))


NOISE = randn(9)
C, U, P = randn(1) + randn(0), randn(2) * 0.3 + randn(0), randn(3) * 0.3 + randn(0)  # alike, as predictions are


def decided(values, output, *, text=(1, 2), inputs=None, samples=None, whole=None, form="same", prior=PRIOR, claims=()):
    predictions = [Prediction(value, NOISE, None, None, slice(0, B), None, lambda x: x) for value in values]
    hashes = {
        "text": text,
        "inputs": inputs or text,
        "samples": samples or (0,) * len(values),
        "whole_samples": whole or samples or (0,) * len(values),
    }
    rows = {name: torch.tensor(numbers)[:, None].expand(-1, B) for name, numbers in hashes.items()}
    observation = observe(predictions, output, reader=Reader(B, form=form), modules=(0,) * len(values), claims=claims, **rows)
    return decide([observation.read()], prior=prior)


def rescaled(guided, cond, share):
    return guided * (share * cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True) + 1 - share)


def per_position(guided, cond):
    return guided * cond.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)


FORMULAS = {
    "u + w (c - u)": lambda c, u, w: u + w * (c - u),
    "c + w (c - u)": lambda c, u, w: c + w * (c - u),
    "negated": lambda c, u, w: -(u + w * (c - u)),
    "rescaled": lambda c, u, w: rescaled(u + w * (c - u), c, 0.7),
    "normalized": lambda c, u, w: rescaled(u + w * (c - u), c, 1.0),
    "normalized at every position": lambda c, u, w: per_position(u + w * (c - u), c),
    "clean sample instead": lambda c, u, w: NOISE - 0.3 * (u + w * (c - u)),
    "half precision": lambda c, u, w: (u.bfloat16() + w * (c.bfloat16() - u.bfloat16())).float(),
}


@pytest.mark.parametrize("formula", FORMULAS)
@given(w=st.floats(1.5, 20.0), swapped=st.booleans())
def test_formula_is_told_in_either_order(formula, w, swapped):
    output = FORMULAS[formula](C, U, w)
    decision = decided([U, C] if swapped else [C, U], output)
    assert decision.roles == "fitted"
    assert (decision.cond, decision.uncond) == ((1, 0) if swapped else (0, 1))


@given(w=st.floats(1.5, 20.0), likeness=st.floats(0.0, 5.0), swapped=st.booleans())
def test_projected_guidance_is_never_swapped(w, likeness, swapped):
    """Adaptive projected guidance: the weights sum to anything, so sometimes nothing can be told."""
    c, u = C + likeness * randn(0), U + likeness * randn(0)
    along = ((c - u) * c).sum((1, 2, 3), keepdim=True) / (c * c).sum((1, 2, 3), keepdim=True) * c
    output = c + (w - 1) * (c - u - 0.8 * along)
    decision = decided([u, c] if swapped else [c, u], output, prior=(1, 0) if swapped else (0, 1))
    assert (decision.cond, decision.uncond) == ((1, 0) if swapped else (0, 1))


@given(w=st.floats(1.5, 20.0), likeness=st.floats(0.0, 1.0), seed=st.integers(0, 99), swapped=st.booleans())
def test_guidance_projected_at_every_channel_is_never_swapped(w, likeness, seed, swapped):
    """ACE-Step. The weights can have any sum, and the noisy sample explains nothing, whatever sign a fit with it would give them."""
    c = randn(seed)
    u = (1 - 0.5 * likeness) * c + likeness * randn(seed + 100)
    along = ((c - u) * c).sum((2, 3), keepdim=True) / (c * c).sum((2, 3), keepdim=True) * c
    output = c + (w - 1) * (c - u - along)
    decision = decided([u, c] if swapped else [c, u], output, prior=(1, 0) if swapped else (0, 1))
    assert (decision.cond, decision.uncond) == ((1, 0) if swapped else (0, 1))


@given(w=st.floats(1.5, 20.0), share=st.floats(0.1, 0.9))
def test_negated_and_renormalized_is_never_swapped(w, share):
    decision = decided([U, C], -share * (U + w * (C - U)), prior=(1, 0))
    assert (decision.cond, decision.uncond) == (1, 0)


@given(w=st.floats(1.5, 20.0))
def test_scale_is_found(w):
    np.testing.assert_allclose(decided([U, C], U + w * (C - U)).scale, w, rtol=1e-4)


@given(w=st.floats(1.2, 15.0), s=st.floats(0.1, 8.0), order=st.permutations("cup"))
def test_perturbed_prediction_is_no_partner(w, s, order):
    values = {"c": C, "u": U, "p": P}
    text = {"c": 1, "u": 2, "p": 1}
    output = U + w * (C - U) + s * (C - P)
    decision = decided([values[name] for name in order], output, text=[text[name] for name in order], prior=None)
    assert (order[decision.cond], order[decision.uncond]) == ("c", "u")
    np.testing.assert_allclose(decision.scale, w, rtol=1e-3)


@given(w=st.floats(1.2, 15.0), s=st.floats(0.1, 8.0), order=st.permutations("cup"))
def test_perturbed_prediction_with_unlike_inputs(w, s, order):
    """Even if the perturbed call differs from the conditional one in an input that is not the text."""
    values, text, inputs = {"c": C, "u": U, "p": P}, {"c": 1, "u": 2, "p": 1}, {"c": 1, "u": 2, "p": 3}
    output = U + w * (C - U) + s * (C - P)
    numbers = [[table[name] for name in order] for table in (text, inputs)]
    decision = decided([values[name] for name in order], output, text=numbers[0], inputs=numbers[1], prior=None)
    assert (order[decision.cond], order[decision.uncond]) == ("c", "u")


@given(w=st.floats(1.2, 15.0), v=st.floats(0.2, 15.0), order=st.permutations("cin"))
def test_image_and_text_guidance(w, v, order):
    """InstructPix2Pix, ties included: the pair is what differs in the text alone."""
    values = {"c": C, "i": P, "n": U}
    text, whole = {"c": 1, "i": 2, "n": 2}, {"c": 5, "i": 5, "n": 6}
    output = U + w * (C - P) + v * (P - U)
    numbers = [[table[name] for name in order] for table in (text, whole)]
    decision = decided([values[name] for name in order], output, text=numbers[0], whole=numbers[1], prior=None)
    assert (order[decision.cond], order[decision.uncond]) == ("c", "i")


def test_other_noisy_sample_is_no_partner():
    decision = decided([U, C, P], U + 5 * (C - U) + 0.75 * (U - P), text=(2, 1, 2), samples=(0, 0, 7), prior=None)
    assert (decision.cond, decision.uncond) == (1, 0)


def test_calls_before_the_guided_one():
    decision = decided([P, U, C], U + 5 * (C - U), text=(3, 2, 1), prior=None)
    assert (decision.cond, decision.uncond) == (2, 1)


@given(w=st.floats(1.5, 15.0), swapped=st.booleans())
def test_order_of_elements_lost(w, swapped):
    output = (U + w * (C - U)).flatten(1)[:, torch.randperm(144, generator=torch.Generator().manual_seed(0))]
    decision = decided([U, C] if swapped else [C, U], output, form="unknown", prior=None)
    assert (decision.cond, decision.uncond) == ((1, 0) if swapped else (0, 1))


CONVERSIONS = {
    "copied": lambda values: values.clone(),
    "negated": lambda values: -values,
    "clean sample": lambda values: NOISE - 0.7 * values,
    "half precision": lambda values: values.bfloat16(),
    "clean sample in half precision": lambda values: NOISE.bfloat16() - 0.7 * values.bfloat16(),
}


class TestWhatAGuiderWasGiven:
    @pytest.mark.parametrize("conversion", CONVERSIONS)
    @pytest.mark.parametrize("order", ["cup", "ucp", "pcu", "puc"])
    def test_is_told_whatever_was_made_of_it(self, conversion, order):
        """Against the arithmetic, which says the opposite: what a guider was given by name counts for more."""
        values, change = {"c": C, "u": U, "p": P}, CONVERSIONS[conversion]
        claims = [(change(C), change(U))]
        decision = decided([values[name] for name in order], C + 3 * (U - C), text=(1, 2, 3), claims=claims, prior=None)
        assert (order[decision.cond], order[decision.uncond], decision.roles) == ("c", "u", "matched")

    def test_another_guider_is_no_matter(self):
        """LTX 2 has one for the sound, whose tensors are made from none of these."""
        claims = [(randn(70), randn(71)), (-C, -U)]
        decision = decided([U, C], C + 3 * (U - C), claims=claims)
        assert (decision.cond, decision.uncond, decision.roles) == (1, 0, "matched")

    @pytest.mark.parametrize("claims", [[(randn(70), randn(71))], [(C, C)], [(C + U, U)]])
    def test_what_is_not_clear_leaves_the_arithmetic(self, claims):
        decision = decided([U, C], U + 5 * (C - U), claims=claims)
        assert (decision.cond, decision.uncond, decision.roles) == (1, 0, "fitted")

    def test_equal_predictions_are_not_told(self):
        decision = decided([C, C.clone(), U], U + 5 * (C - U), text=(1, 1, 2), claims=[(C.clone(), U.clone())])
        assert decision.roles == "fitted"


class TestNothingIsGuessed:
    def test_zero_output_leaves_the_convention(self):
        decision = decided([C, U], torch.zeros_like(C))
        assert (decision.roles, decision.cond, decision.final) == ("assumed", 0, False)

    def test_unrelated_output_leaves_the_convention(self):
        assert decided([C, U], randn(77)).roles == "assumed"

    def test_samples_that_disagree_leave_the_convention(self):
        output = torch.stack([(U + 5 * (C - U))[0], (C + 5 * (U - C))[1]])
        assert decided([C, U], output).roles == "assumed"

    def test_a_later_evaluation_can_tell(self):
        parts = [Prediction(value, NOISE, None, None, slice(0, B), None, lambda x: x) for value in (U, C)]
        rows = {name: torch.tensor([[1] * B, [2] * B]) for name in ("text", "inputs")}
        rows |= {name: torch.zeros(2, B, dtype=torch.int64) for name in ("samples", "whole_samples")}
        observed = [observe(parts, output, reader=Reader(B), modules=(0, 0), **rows).read() for output in (torch.zeros_like(C), U + 5 * (C - U))]
        assert decide(observed, prior=(0, 1)).cond == 1

    def test_three_without_a_fit_are_missing(self):
        decision = decided([U, C, P], randn(77), text=(2, 1, 3), prior=None)
        assert decision.cond is None
        assert "does not show" in decision.reason
        assert "ModuleAdapter" in decision.remedy  # a larger guidance scale would not help

    def test_same_conditioning_is_missing(self):
        decision = decided([C, P], C + 3 * (C - P), text=(1, 1))
        assert (decision.cond, decision.final) == (None, True)
        assert "same conditioning" in decision.reason

    def test_nan_leaves_the_convention(self):
        assert decided([torch.full_like(C, torch.nan), U], C).roles == "assumed"


class TestReading:
    @pytest.mark.parametrize(
        ("output", "given", "read"),
        [
            ((4, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8)),
            ((4, 8, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8)),  # learned variance
            ((2, 12, 3), (2, 8, 3), (2, 8, 3)),  # tokens of a reference image
            ((2, 4, 1, 8, 8), (2, 4, 8, 8), (2, 4, 1, 8, 8)),
            ((4, 4, 3, 8, 8), (6, 4, 8, 8), (4, 4, 3, 8, 8)),  # frames in the batch
        ],
    )
    def test_forms(self, output, given, read):
        values = torch.zeros(output)
        assert tuple(readers((values,), given)[0]((values,)).shape) == read

    def test_what_is_no_prediction(self):
        assert readers(torch.zeros(3, 4, 8, 8), (2, 4, 8, 8)) == []
        assert readers(([torch.zeros(2, 16)], torch.zeros(2, 16)), (2, 4, 8, 8)) == []
        assert readers({"loss": None}, (2, 4, 8, 8)) == []

    def test_reference_tokens_may_come_first_or_last(self):
        first, last = readers(torch.zeros(2, 12, 3), (2, 8, 3))
        values = torch.arange(12.0)[None, :, None].expand(2, 12, 3)
        assert first(values)[0, :, 0].tolist() == list(range(8))
        assert last(values)[0, :, 0].tolist() == list(range(4, 12))
