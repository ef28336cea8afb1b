"""The measures tell copies from other pictures, and read what a picture shows."""

import numpy as np
import torch

from memhook.testbed import evidence
from memhook.testbed.measures import COPY_THRESHOLD, copy_similarities, copy_similarity
from memhook.testbed.scenes import draw, random_scene


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return evidence.to_tensor(np.stack([draw(random_scene(rng)) for _ in range(count)]))


def test_a_picture_is_a_copy_of_itself_also_paler_or_stronger():
    x = pictures(20)
    torch.testing.assert_close(copy_similarity(x, x), torch.ones(20))
    torch.testing.assert_close(copy_similarity(0.5 * x + 0.1, x), torch.ones(20), atol=1e-4, rtol=0)


def test_similarities_of_all_pairs_hold_those_of_given_pairs():
    x, y = pictures(6, 0), pictures(6, 1)
    torch.testing.assert_close(copy_similarities(x, y).diagonal(), copy_similarity(x, y))


def test_a_flat_picture_is_no_copy_of_anything():
    assert float(copy_similarity(torch.zeros(1, 3, 32, 32), pictures(1))) < COPY_THRESHOLD


def test_the_measures_hold_on_held_out_pairs():
    validation = evidence.validate_measures(pairs=400)
    assert validation.copy_auc > 0.995
    assert validation.copies_found > 0.9
    assert validation.others_matched < 0.02
    assert validation.subject_accuracy > 0.95
    assert validation.color_accuracy > 0.9
