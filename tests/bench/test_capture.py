"""What watching costs: counts, on a small pipeline; times are the command's affair."""

import pytest

from memhook.bench.capture import capture_rows, random_pipeline

IMAGES, STEPS = 8, 10


@pytest.fixture(scope="module")
def rows():
    found = capture_rows(random_pipeline(width=16, size=8), images=IMAGES, steps=STEPS, rounds=1)
    return {row.way: row for row in found}


def test_both_ways_in_one_run(rows):
    assert set(rows) == {"memhook.watch", "naive"}
    assert all(row.spread[0] <= row.ratio <= row.spread[1] for row in rows.values())


def test_watching_reads_nothing_into_python(rows):
    assert rows["memhook.watch"].host_reads == 0
    assert rows["naive"].host_reads == IMAGES


def test_watching_keeps_under_a_kibibyte_an_evaluation(rows):
    assert 0 < rows["memhook.watch"].kept_bytes < 1024
    latents = IMAGES * 4 * 8 * 8 * 4
    assert rows["naive"].kept_bytes == latents + 8 * IMAGES
