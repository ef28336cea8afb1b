"""The two loops of docs/training.md are the loops without the filter but for a few lines, and train alike where nothing is dropped.

``tests/test_documents.py`` runs the page as it stands.
"""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
LOOPS = [block for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL) if "# loop: begin" in block]


def without_the_filter(loop):
    """The loop as its owner had it before."""
    loop = re.sub(r"^( *)with memhook\.training_filter\(.*\) as f:  # filter$", r"\1if True:", loop, flags=re.MULTILINE)
    loop = re.sub(r"f\.mean\((\w+), .*\)  # filter.*$", r"\1.mean()", loop, flags=re.MULTILINE)
    assert "# filter" not in loop
    return re.sub(r"^.*f\.report\(\).*$", "", loop, flags=re.MULTILINE)


def run(code):
    names = {}
    exec(compile("import memhook\n" + code, "docs/training.md", "exec"), names)  # noqa: S102 -- the page's own code
    return names


def parameters(names):
    return torch.cat([parameter.detach().flatten() for parameter in names["unet"].parameters()])


@pytest.mark.parametrize("loop", LOOPS, ids=["bare", "diffusers"])
def test_at_most_five_lines_differ(loop):
    before, after = without_the_filter(loop).splitlines(), loop.splitlines()
    changed = [line for line in after if line.strip() not in {other.strip() for other in before} and "f.report" not in line]
    assert 1 <= len(changed) <= 5
    assert all("# filter" in line for line in changed)


@pytest.mark.parametrize("loop", LOOPS, ids=["bare", "diffusers"])
def test_a_filter_that_keeps_all_trains_as_the_loop_without_it(loop, capsys):
    plain = run(without_the_filter(loop))
    kept = run(loop.replace("threshold=4.0", "threshold=torch.inf"))
    assert torch.equal(parameters(kept), parameters(plain))
    report = kept["f"].report()
    assert (report.steps, report.samples, report.judged, report.dropped) == (3, 12, 12, 0)
    assert len(report.rows) == 12


@pytest.mark.parametrize("loop", LOOPS, ids=["bare", "diffusers"])
def test_a_filter_that_drops_all_leaves_weight_decay_alone(loop, capsys):
    dropped = run(loop.replace("threshold=4.0", "threshold=0.0"))
    start = parameters(run(loop.split("# loop: begin")[0]))
    report = dropped["f"].report()
    assert (report.dropped, report.wholly_dropped) == (12, 3)
    assert (parameters(dropped) - start).abs().max() < 1e-5  # three steps of decay, at a rate of 1e-6


def test_there_are_two():
    assert len(LOOPS) == 2
