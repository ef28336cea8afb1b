"""Two processes over gloo: a rank whose whole batch is dropped takes part, and nobody waits for it in vain."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WORKER = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
import memhook
from tests.training_models import NULL, Plain, losses_of, pairs

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=240))
levels = [[(3.0, 3.0), (0.5, 3.0), (3.0, 3.0)], [(0.5, 3.0), (1.0, 0.5), (3.0, 3.0)]][rank]  # step by step
found = {}
for given in ("wrapper", "inner"):
    model = Plain()
    ddp = DDP(model)
    through = []
    ddp.register_forward_hook(lambda *_: through.append(1))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    gradients = []
    with memhook.training_filter(ddp if given == "wrapper" else model, null_embedding=NULL, threshold=4.0) as f:
        for step, chosen in enumerate(levels):
            sample, t, text, target = pairs(*chosen, seed=10 * step + rank)
            optimizer.zero_grad()
            f.mean(losses_of(ddp(sample, t, text), target), keys=[f"{rank}-{step}-{i}" for i in range(2)]).backward()
            gradients.append(float(model.weight.grad))
            optimizer.step()
    reports = [None, None]
    dist.all_gather_object(reports, f.report())
    report = reports[0].merged(reports[1])
    found[given] = {"gradients": gradients, "weight": float(model.weight), "calls": len(model.calls), "through": len(through),
                    "own": f.report().dropped, "dropped": report.dropped, "wholly": report.wholly_dropped, "rows": len(report.rows)}
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, after a run with the filter on the DDP wrapper and one with it on the module inside."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        logs = [folder / f"{rank}.log" for rank in range(2)]
        workers = []
        for rank, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            worker = subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder)], cwd=ROOT, stdout=output, stderr=output)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append(worker)
        codes = [worker.wait(timeout=300) for worker in workers]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_ranks_agree_though_one_of_them_drops_its_whole_batch(ranks, given):
    first, second = (rank[given] for rank in ranks)
    assert first["gradients"] == second["gradients"]
    assert first["weight"] == second["weight"]
    assert first["gradients"] == pytest.approx(expected_gradients(), rel=1e-4, abs=1e-6)
    assert first["gradients"][2] == 0  # both dropped all they had
    assert (first["own"], second["own"], first["dropped"], first["wholly"], first["rows"]) == (5, 3, 8, 3, 12)
    assert first["calls"] == second["calls"] == 6
    assert first["through"] == second["through"] == 3  # the extra passes stay out of DDP's bookkeeping


def expected_gradients():
    """The mean over ranks of each rank's mean over its kept samples, on one process."""
    import torch

    from tests.training_models import Plain, losses_of, pairs

    model, found = Plain(), []
    kept = [[[], [0], []], [[0], [0, 1], []]]
    levels = [[(3.0, 3.0), (0.5, 3.0), (3.0, 3.0)], [(0.5, 3.0), (1.0, 0.5), (3.0, 3.0)]]
    for step in range(3):
        model.zero_grad()
        total = model.weight * 0
        for rank in range(2):
            sample, t, text, target = pairs(*levels[rank][step], seed=10 * step + rank)
            chosen = losses_of(model(sample, t, text), target)[kept[rank][step]]
            total = total + (chosen.mean() / 2 if len(chosen) else 0)
        total.backward()
        found.append(float(model.weight.grad))
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad
    return found
