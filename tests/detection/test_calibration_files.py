"""Calibration files: what is saved is what is loaded, and a damaged file is an error of ours, whatever was done to it."""

import contextlib
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import Calibration, CalibrationError, calibrate
from memhook.testing import sample, tiny_unet


def real(first=None):
    """A calibration from watched runs, with a model's fingerprint."""
    unet, traces = tiny_unet(), []
    for seed in range(3):
        with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
            sample(unet, seed=seed)
        traces.append(trace)
    return calibrate(traces, first=first)


def same(a, b):
    return np.array_equal(a.magnitudes, b.magnitudes, equal_nan=True) and a.first == b.first and dict(a.setting) == dict(b.setting)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_round_trip(tmp_path_factory, prompts, evaluations, seed, data):
    magnitudes = np.random.default_rng(seed).random((prompts, evaluations), np.float32)
    if evaluations > 1:
        magnitudes[:, 0] = np.nan  # an evaluation without guidance
    first = data.draw(st.one_of(st.none(), st.integers(min(2, evaluations), evaluations)))
    names = st.sampled_from(["host", "sampler", "präfix", "note"])
    setting = data.draw(st.dictionaries(names, st.one_of(st.text(max_size=5), st.integers(), st.lists(st.integers(), max_size=3))))
    path = tmp_path_factory.mktemp("files") / "calibration.safetensors"
    calibration = Calibration(magnitudes, first, setting)
    calibration.save(path)
    assert same(Calibration.load(path), calibration)


@pytest.mark.parametrize("first", [None, 1, 2])
def test_round_trip_of_a_real_one(tmp_path, first):
    calibration = real(first)
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert same(loaded, calibration)
    assert {"model", "timesteps", "shape", "host", "space", "images_per_prompt"} <= loaded.setting.keys()
    np.testing.assert_array_equal(loaded.p_value(calibration.scores), calibration.p_value(calibration.scores))


def test_numbers_of_numpy_are_saved(tmp_path):
    calibrate([1.0, 2.0], first=np.int64(3)).save(str(tmp_path / "c.safetensors"))
    assert Calibration.load(str(tmp_path / "c.safetensors")).first == 3


def test_one_file_and_nothing_else(tmp_path):
    for scores in ([1.0], [1.0, 2.0]):  # the second replaces the first
        calibrate(scores).save(tmp_path / "c.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert len(Calibration.load(tmp_path / "c.safetensors")) == 2


def test_a_failing_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    calibrate([1.0]).save(path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        calibrate([1.0, 2.0]).save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert len(Calibration.load(path)) == 1


def test_a_setting_that_is_no_json_is_not_half_written(tmp_path):
    with pytest.raises(TypeError):
        Calibration(np.ones((1, 1), np.float32), None, {"model": object()}).save(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


# ---- files that are no calibrations


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"there is no calibration file .*nowhere\.safetensors; make one"):
        Calibration.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CalibrationError, match="there is no calibration file"):
        Calibration.load(tmp_path)


def write(path, *, tensors=None, about=None, metadata=None):
    """A well-formed safetensors file with what a calibration should not have."""
    tensors = {"magnitudes": np.ones((3, 2), np.float32)} if tensors is None else tensors
    standard = {"format": "memhook-calibration-1", "first": None, "setting": {}}
    metadata = {"memhook": json.dumps({**standard, **(about or {})})} if metadata is None else metadata
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata or None))


WRONG = {
    "no metadata": {"metadata": {}},
    "other metadata": {"metadata": {"format": "pt"}},
    "metadata that is no JSON": {"metadata": {"memhook": "{"}},
    "metadata that is a list": {"metadata": {"memhook": "[]"}},
    "deep metadata": {"metadata": {"memhook": "[" * 100_000}},
    "another format": {"about": {"format": "memhook-calibration-2"}},
    "no magnitudes": {"tensors": {"scores": np.ones((3, 2), np.float32)}},
    "magnitudes in float64": {"tensors": {"magnitudes": np.ones((3, 2))}},
    "magnitudes in int8": {"tensors": {"magnitudes": np.ones((3, 2), np.int8)}},
    "magnitudes with one axis": {"tensors": {"magnitudes": np.ones(3, np.float32)}},
    "no prompts": {"tensors": {"magnitudes": np.ones((0, 2), np.float32)}},
    "NaN": {"tensors": {"magnitudes": np.full((3, 2), np.nan, np.float32)}},
    "infinity": {"tensors": {"magnitudes": np.full((3, 2), np.inf, np.float32)}},
    "first is too large": {"about": {"first": 3, "setting": {"host": "x"}}},
    "first is zero": {"about": {"first": 0}},
    "first is text": {"about": {"first": "1"}},
    "first is true": {"about": {"first": True}},
    "first is a float": {"about": {"first": 1.0}},
    "the setting is a list": {"about": {"setting": []}},
    "the model is text": {"about": {"setting": {"model": "sd14"}}},
    "the model has no values": {"about": {"setting": {"model": {"structure": "ab"}}}},
    "the model's values are text": {"about": {"setting": {"text_encoder": {"structure": "ab", "values": ["1"]}}}},
    "timesteps are text": {"about": {"setting": {"timesteps": "999"}}},
    "timesteps are nested": {"about": {"setting": {"timesteps": [[999]]}}},
    "sigmas are null": {"about": {"setting": {"sigmas": None}}},
    "the guidance scale is text": {"about": {"setting": {"guidance_scale": "7.5"}}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    path = tmp_path / "c.safetensors"
    write(path, **WRONG[name])
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(path)
    assert len(str(caught.value)) < 400


def test_the_plain_one_of_these_is_accepted(tmp_path):
    write(tmp_path / "c.safetensors")
    assert len(Calibration.load(tmp_path / "c.safetensors")) == 3


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "c.safetensors"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse
    with pytest.raises(CalibrationError, match=r"314,572,800 bytes; a calibration has at most 268,435,456"):
        Calibration.load(path)


def test_a_pickle_is_not_executed(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "c.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CalibrationError, match="cannot be read as a calibration"):
        Calibration.load(path)
    assert not (tmp_path / "executed").exists()


def loads_or_refuses(path, trace):
    """Load a damaged file and use what comes out; only our own errors are allowed. Says whether it loaded."""
    try:
        calibration = Calibration.load(path)
    except CalibrationError:
        return False
    calibration.p_value([0.5, 2.0])
    if trace is None:
        return True
    with contextlib.suppress(memhook.MemhookError):
        memhook.detect(trace, calibration, fpr=0.5)
    return True


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a real calibration, and a trace to use it on."""
    path = tmp_path_factory.mktemp("good") / "c.safetensors"
    real().save(path)
    unet = tiny_unet()
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
        sample(unet)
    trace.unet = unet  # kept alive, for its fingerprint
    assert loads_or_refuses(path, trace)
    return path.read_bytes(), trace


def test_every_truncation_is_refused(tmp_path, good):
    data, trace = good
    path = tmp_path / "c.safetensors"
    rng = random.Random(0)
    for length in [*range(12), *rng.sample(range(12, len(data)), 60), len(data) - 1]:
        path.write_bytes(data[:length])
        assert not loads_or_refuses(path, trace)


def test_random_bytes_are_refused(tmp_path, good):
    path = tmp_path / "c.safetensors"
    rng = random.Random(1)
    for _ in range(60):
        path.write_bytes(rng.randbytes(rng.randrange(400)))
        assert not loads_or_refuses(path, good[1])


def memory_mark(name):
    """A line of this process's memory in MiB (Linux): ``VmRSS`` now, or ``VmHWM`` for the most since `forget_peak`."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")) / 1024


def forget_peak():
    """Whether the system could start to count the most memory anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return memory_mark("VmHWM") < memory_mark("VmRSS") + 16


def test_mutations_of_bytes_give_no_other_error(tmp_path, good):
    """And none of them takes a second of work or 200 MiB: a damaged length must not make a reader allocate it."""
    data, trace = good
    path = tmp_path / "c.safetensors"
    rng, loaded, longest = random.Random(2), 0, 0.0
    measured = forget_peak()
    before = memory_mark("VmRSS") if measured else 0.0
    for number in range(5000):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            where = rng.randrange(len(mutated))
            kind = rng.randrange(3)
            if kind == 0:
                mutated[where] = rng.randrange(256)
            elif kind == 1:
                del mutated[where : where + rng.randrange(1, 9)]
            else:
                mutated[where:where] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(bytes(mutated))
        started = time.thread_time()
        loaded += loads_or_refuses(path, trace if number % 10 == 0 else None)
        longest = max(longest, time.thread_time() - started)
    assert 0 < loaded < 5000  # a changed digit still is a calibration
    assert longest < 1
    assert not measured or memory_mark("VmHWM") - before < 200


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["structure", "values", "dtype"]), inner, max_size=3)),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["model", "timesteps", "sigmas", "guided_evaluations", "guidance_scale", "shape", "host", "images_per_prompt", "space"]), JUNK
    ),
    JUNK,
)
def test_mutations_of_the_setting_give_no_other_error(tmp_path_factory, good, changes, first):
    path = tmp_path_factory.mktemp("junk") / "c.safetensors"
    setting = {**real_setting(good[0]), **changes}
    write(
        path,
        about={"setting": setting, "first": first if isinstance(first, (list, str)) else None},
        tensors={"magnitudes": np.ones((3, 4), np.float32)},
    )
    loads_or_refuses(path, good[1])


def real_setting(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["memhook"])["setting"]
