"""Two processes over gloo: a rank whose whole batch is dropped takes part, and nobody waits for it in vain."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WORKER = """
import json, sys, warnings
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
import memhook
from tests.training.models import NULL, Plain, losses_of, pairs

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

# Only the first rank has a judged sample in the first step, only the second in the next one, none in the last.
timesteps = [[(900, 10), (10, 20), (10, 20)], [(10, 20), (950, 900), (30, 40)]][rank]


class SyncBatchNorm(torch.nn.Module):  # torch's own needs a GPU; this one waits for the other rank alike
    def forward(self, x):
        mean = x.detach().mean()
        dist.all_reduce(mean)
        return x - mean / 2


class Meeting(Plain):
    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm()

    def forward(self, sample, timestep, encoder_hidden_states):
        return super().forward(self.norm(sample), timestep, encoder_hidden_states)


for given, build in (("judged", Plain), ("meeting", Meeting)):
    model = build()
    ddp = DDP(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    gradients, kept = [], []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with memhook.training_filter(ddp, null_embedding=NULL, threshold=4.0, timesteps=(800, 999), remember=1) as f:
            for step, t in enumerate(timesteps):
                sample, _, text, target = pairs(3.0, 3.0, seed=10 * step + rank)
                optimizer.zero_grad()
                # in the last step each rank is shown what the other one has judged
                keys = [["a", "b"], ["c", "d"], ["c", "b"]][step] if rank == 0 else [["x", "y"], ["c", "z"], ["a", "z"]][step]
                f.mean(losses_of(ddp(sample, torch.tensor(t), text), target), keys=keys).backward()
                gradients.append(float(model.weight.grad))
                optimizer.step()
                f.exchange()
    report = f.report()
    found[given] = {"gradients": gradients, "calls": len(model.calls), "passes": report.passes, "passed": report.passed,
                    "dropped": report.dropped, "left": report.remembered, "remembered": sorted(f.remembered()),
                    "told": [str(entry.message) for entry in told if "whole batch" in str(entry.message)]}
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


def test_a_rank_without_a_judged_sample_makes_no_pass_and_keeps_nobody_waiting(ranks):
    first, second = (rank["judged"] for rank in ranks)
    assert first["gradients"] == second["gradients"]
    assert (first["passes"], first["passed"], first["dropped"]) == (1, 1, 1)
    assert (second["passes"], second["passed"], second["dropped"]) == (1, 2, 2)
    assert (first["calls"], second["calls"]) == (3 + 2, 3 + 1)  # a part of the batch is tried first; the whole one is not
    assert first["told"] == second["told"] == []


def test_what_one_rank_flagged_is_left_out_by_the_other_after_an_exchange(ranks):
    first, second = (rank["judged"] for rank in ranks)
    assert first["remembered"] == second["remembered"] == ["a", "c", "z"]
    assert (first["left"], second["left"]) == (1, 2)  # "c" there; "a", and "z" of its own, here


def test_a_denoiser_whose_ranks_meet_in_the_forward_pass_makes_it_on_all_of_them(ranks):
    """With SyncBatchNorm (or sharded weights) a rank that makes no pass would leave the other one waiting."""
    first, second = (rank["meeting"] for rank in ranks)
    assert first["gradients"] == second["gradients"]
    for rank in (first, second):
        assert (rank["calls"], rank["passes"], rank["passed"]) == (6, 3, 6)
        assert len(rank["told"]) == 1
        assert "communicates with other processes" in rank["told"][0]
    assert (first["dropped"], second["dropped"]) == (1, 2)


def expected_gradients():
    """The mean over ranks of each rank's mean over its kept samples, on one process."""
    import torch

    from tests.training.models import Plain, losses_of, pairs

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
