"""The nodes, loaded by path as ComfyUI loads them, in the example workflows and in others."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import memhook
from memhook.errors import MemhookError
from tests.adapters.comfy.server import InterruptProcessingException, Server, StandInModel, core_nodes, install

FOLDER = Path(__file__).parents[2] / "adapters" / "memhook_comfyui" / "node_pack"
WORKFLOWS = FOLDER / "example_workflows"
pytestmark = pytest.mark.filterwarnings("ignore:the samples .* did not come down to the magnitude:UserWarning")
SAMPLER = {"seed": 1, "steps": 4, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Through a link, under a name of ComfyUI's making."""
    link = tmp_path_factory.mktemp("custom_nodes") / "memhook"
    link.symlink_to(FOLDER, target_is_directory=True)
    name = str(link).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
        del sys.modules[loaded]


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.fixture
def server(pack, comfy):
    return Server({**core_nodes(), **pack.NODE_CLASS_MAPPINGS, "MemhookDemoModel": StandInModel})


def workflow(name):
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    for node in graph.values():
        node.pop("_meta", None)
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 4
        if "false_alarms" in node["inputs"]:
            node["inputs"]["false_alarms"] = 0.3  # the stand-in has three harmless prompts
    return graph


def of_kind(graph, kind):
    return next(name for name, node in graph.items() if node["class_type"] == kind)


def test_every_node_is_described(pack, comfy):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert node.CATEGORY == "memhook", name
        assert node.DESCRIPTION, name
        assert callable(getattr(node, node.FUNCTION)), name
        inputs = node.INPUT_TYPES()
        for entries in (inputs.get("required", {}), inputs.get("optional", {})):
            assert all(options["tooltip"] for _, options in entries.values()), name


def test_detect_workflow(server):
    graph = workflow("memhook_detect")
    shown, _ = server.execute(graph)
    report, words = shown[of_kind(graph, "MemhookReport")], shown[of_kind(graph, "MemhookAttributeTokens")]
    assert report["text"][0].startswith("score ")
    assert "p-value" in report["text"][0]
    assert "lighthouse" in words["text"][0]
    picture, text, score, p_value = server.outputs[of_kind(graph, "MemhookReport")]
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert f"score {score:.3g}" in text
    assert 0 < p_value <= 1


def test_report_is_of_the_run_that_made_the_latent(server):
    """The same numbers as a watch by hand; after a new seed, others; after the old seed, the old ones."""
    graph = workflow("memhook_detect")
    sampler, report = of_kind(graph, "KSampler"), of_kind(graph, "MemhookReport")
    scores, ran = {}, {}
    for seed in (1, 2, 1):
        graph[sampler]["inputs"]["seed"] = seed
        _, ran[seed] = server.execute(graph)
        scores.setdefault(seed, []).append(server.outputs[report][2])
    assert set(ran[2]) == {sampler, *(name for name, node in graph.items() if [sampler, 0] in node["inputs"].values())} | {"9", "12"}
    assert scores[1][0] == scores[1][1] != scores[2][0]

    model, positive, negative = server.outputs["1"][0], server.outputs["2"][0], server.outputs["3"][0]
    with memhook.watch(model) as trace, torch.inference_mode():
        core_nodes()["KSampler"]().run(model, 2, 4, 7.5, "euler", "normal", positive, negative, server.outputs["4"][0], 1.0)
    np.testing.assert_allclose(scores[2][0], trace.score(first=1).mean(), rtol=1e-6)


def test_two_samplers_of_one_model(server):
    graph = workflow("memhook_detect")
    sampler, report = of_kind(graph, "KSampler"), of_kind(graph, "MemhookReport")
    graph["21"] = {"class_type": "KSampler", "inputs": {**graph[sampler]["inputs"], "seed": 9, "cfg": 3.0}}
    graph["22"] = {"class_type": "MemhookReport", "inputs": {**graph[report]["inputs"], "latent": ["21", 0]}}
    server.execute(graph)
    both = server.outputs[report][2], server.outputs["22"][2]
    assert both[0] != both[1]
    graph[report]["inputs"]["evaluations"] = 1
    graph[report]["inputs"]["false_alarms"] = 0.4  # only the reports run again, and each finds its own run
    graph["22"]["inputs"]["false_alarms"] = 0.4
    _, ran = server.execute(graph)
    assert set(ran) == {report, "12", "22"}
    assert (server.outputs[report][2], server.outputs["22"][2]) == both


def test_latents_of_unwatched_samplers_have_no_report(pack, comfy):
    with pytest.raises(MemhookError, match="was not made by a sampler with a watched model"):
        pack.Report().report({"samples": torch.randn(1, 4, 8, 8)}, 1, 0.01)


def test_prevent_workflow(server):
    """Guarded and mitigated runs come out otherwise, and the prompt itself is as it was."""
    graph = workflow("memhook_prevent")
    graph[of_kind(graph, "MemhookGuard")]["inputs"].update(target=0.01, max_steps=2, false_alarms=0.9)
    graph[of_kind(graph, "MemhookMitigate")]["inputs"].update(target=0.01, max_steps=3)
    shown, _ = server.execute(graph)
    original, mitigated = server.outputs["2"][0], server.outputs[of_kind(graph, "MemhookMitigate")][0]
    assert mitigated[0][0].shape == original[0][0].shape
    assert torch.equal(mitigated[0][0][:, :1], original[0][0][:, :1])
    assert not torch.equal(mitigated[0][0], original[0][0])
    assert torch.equal(
        original[0][0], StandInModel().load()[1].encode_from_tokens_scheduled(server.outputs["1"][1].tokenize("a lighthouse at dusk"))[0][0]
    )
    server.execute(workflow("memhook_detect"))
    before = server.outputs["10"][2]
    server.execute(graph)
    assert server.outputs["16"][2] < before
    assert any("guard: " in text for text in shown["10"]["text"])


def test_guard_stops_as_if_cancelled(server):
    graph = workflow("memhook_prevent")
    guard = graph[of_kind(graph, "MemhookGuard")]["inputs"]
    guard.update(action="stop", false_alarms=0.9)
    graph["2"]["inputs"]["text"] = "a lighthouse at dusk"
    with pytest.raises(InterruptProcessingException) as caught:
        server.execute({key: graph[key] for key in ("1", "2", "3", "4", "5", "6", "7")})
    assert isinstance(caught.value.__cause__, memhook.MemorizationDetectedError)
    assert server.cache[next(key for key in server.cache if key[0] == "1")][0].model.current_patcher is None


def test_guard_needs_something_to_judge_by(pack, comfy):
    model = StandInModel().load()[0]
    for action, target in (("stop", 1.0), ("mitigate", 0.0)):
        with pytest.raises(MemhookError, match="has no calibration"):
            pack.Guard().guard(model, action, 0.01, target, 0.05, 10)


@pytest.mark.parametrize("kind", ["calibrate", "attribute", "mitigate"])
def test_long_nodes_can_be_cancelled(pack, comfy, kind):
    model, clip, *_ = StandInModel().load()
    negative, latent = clip.encode_from_tokens_scheduled(clip.tokenize("")), {"samples": torch.zeros(2, 4, 8, 8)}
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a lighthouse"))
    calls = {
        "calibrate": lambda: pack.Calibrate().calibrate(model, clip, "a\ntwo\nred", negative, latent, 1, "x", **SAMPLER),
        "attribute": lambda: pack.AttributeTokens().attribute(model, clip, "a lighthouse", negative, latent, 2, **SAMPLER),
        "mitigate": lambda: pack.Mitigate().mitigate(model, positive, negative, latent, 0.01, 0.05, 3, 1, **SAMPLER),
    }
    with torch.inference_mode():
        calls[kind]()
        assert comfy.progress
        assert comfy.progress[-1][0] == comfy.progress[-1][1]
        comfy.interrupted = True
        with pytest.raises(InterruptProcessingException):
            calls[kind]()
        calls[kind]()
    assert model.wrappers == {}
    assert model.model.current_patcher is None


def test_nodes_make_their_own_runs_unwatched(pack, comfy):
    """A probe of a watched and guarded model is neither in the reports nor stopped."""
    model, clip, *_ = StandInModel().load()
    negative, latent = clip.encode_from_tokens_scheduled(clip.tokenize("")), {"samples": torch.zeros(1, 4, 8, 8)}
    calibration = memhook.calibrate([0.0], first=1)
    (watched,) = pack.Watch().watch(model)
    (guarded,) = pack.Guard().guard(watched, "stop", 0.5, 0.0, 0.05, 10, calibration)
    with torch.inference_mode():
        pack.AttributeTokens().attribute(guarded, clip, "a lighthouse", negative, latent, 1, **SAMPLER)
    assert set(guarded.wrappers["outer_sample"]) == {"memhook"}
    assert model.wrappers == {}


def test_watched_pictures_are_the_same_bits(pack, comfy):
    model, clip, *_ = StandInModel().load()
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a lighthouse", ""))
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    sampler = core_nodes()["KSampler"]()
    with torch.inference_mode():
        plain = sampler.run(model, 5, 4, 7.5, "heun", "normal", positive, negative, latent, 1.0)[0]["samples"]
        watched = sampler.run(pack.Watch().watch(model)[0], 5, 4, 7.5, "heun", "normal", positive, negative, latent, 1.0)[0]["samples"]
    assert torch.equal(plain, watched)


def test_calibrations_are_saved_and_loaded(pack, comfy, tmp_path):
    model, clip, *_ = StandInModel().load()
    negative, latent = clip.encode_from_tokens_scheduled(clip.tokenize("")), {"samples": torch.zeros(2, 4, 8, 8)}
    made, text = pack.Calibrate().calibrate(model, clip, "a\n\ntwo\nred\n red ", negative, latent, 2, "mine", **SAMPLER)
    assert len(made) == 3
    assert "mine.safetensors" in text
    assert pack.LoadCalibration.INPUT_TYPES()["required"]["name"][0] == ["mine"]
    (loaded,) = pack.LoadCalibration().load("mine")
    assert np.array_equal(loaded.scores, made.scores)
    assert loaded.setting["host"] == "comfyui"
    for name in ("../outside", "", "a/b"):
        with pytest.raises(MemhookError):
            pack.Calibrate().calibrate(model, clip, "a", negative, latent, 1, name, **SAMPLER)
        with pytest.raises(MemhookError):
            pack.LoadCalibration().load(name)
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_setting_is_an_error(server):
    graph = workflow("memhook_detect")
    graph[of_kind(graph, "KSampler")]["inputs"]["latent_image"] = ["30", 0]
    graph["30"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    with pytest.raises(memhook.CalibrationMismatchError, match="images_per_prompt"):
        server.execute(graph)


def test_both_formats_are_one_workflow(pack, comfy):
    """The editor's format says by links and lists of widgets what the API's says by names."""
    core = {
        "CLIPTextEncode": ["text", "clip"],
        "EmptyLatentImage": ["width", "height", "batch_size"],
        "KSampler": ["model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise"],
        "VAEDecode": ["samples", "vae"],
        "SaveImage": ["images", "filename_prefix"],
        "PreviewAny": ["source"],
    }
    for path in (WORKFLOWS / "api").glob("*.json"):
        api = json.loads(path.read_text())
        editor = json.loads((WORKFLOWS / path.name).read_text())
        links = {link[0]: [str(link[1]), link[2]] for link in editor["links"]}
        assert len(api) == len(editor["nodes"])
        for node in editor["nodes"]:
            widgets, found = list(node["widgets_values"]), {}
            for entry in node["inputs"]:
                value = widgets.pop(0) if "widget" in entry else None
                if entry["name"] == "seed":
                    assert widgets.pop(0) in ("fixed", "randomize")
                if entry["link"] is not None:
                    value = links[entry["link"]]
                if value is not None:
                    found[entry["name"]] = value
            assert not widgets
            assert found == api[str(node["id"])]["inputs"]
            kind = node["type"]
            known = core.get(kind) or [
                name for part in ("required", "optional") for name in pack.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES().get(part, {})
            ]
            assert [entry["name"] for entry in node["inputs"]] == sorted(known, key=[entry["name"] for entry in node["inputs"]].index)


def test_registry_metadata():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    about = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert about["project"]["version"] == memhook.__version__
    assert "comfyui" not in about["project"]["name"].lower()
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= about["tool"]["comfy"].keys()


def test_tokens_of_long_prompts_and_several_encoders(pack):
    from memhook_comfyui.node_pack.tokens import prompt_tokens

    class Words:
        start_token, end_token, pad_token = 0, 1, 1
        inv_vocab: ClassVar = {0: "<s>", 1: "</s>", 2: "snow", 3: "fall</w>", 4: "in</w>"}

    class Clip:
        class tokenizer:  # noqa: N801 -- ComfyUI's name
            clip_l = clip_g = t5xxl = Words

        def __init__(self, tokens):
            self.tokenize = lambda text: tokens

    chunk = [(0, 1.0), (2, 1.0), (3, 1.2), (4, 1.0), (1, 1.0)]
    embedding = [(0, 1.0), (torch.zeros(4), 1.0), (1, 1.0)]
    two = prompt_tokens(Clip({"l": [chunk, chunk]}), "", 10)
    assert [word.text for word in two.words] == ["snowfall", "in", "snowfall", "in"]
    assert [word.text for word in prompt_tokens(Clip({"g": [chunk], "l": [chunk]}), "", 5).words] == ["snowfall", "in"]
    assert len(prompt_tokens(Clip({"g": [chunk], "l": [chunk], "t5xxl": [embedding]}), "", 8)) == 8
    assert prompt_tokens(Clip({"l": [embedding]}), "", 3).pieces[1] == "<embedding></w>"
    assert prompt_tokens(Clip({"l": [chunk]}), "", 7) is None
