"""ComfyUI's modules by name, and its executor: a graph in API format, nodes under inference_mode, outputs cached by their inputs."""

import sys
import types
from typing import ClassVar

import torch

from tests.adapters.comfy.guiders import CFGGuider
from tests.adapters.comfy.model import make_patcher
from tests.adapters.comfy.samplers import make_sampler

WORDS = ("a", "two", "lighthouse", "apples", "at", "dusk", "red", "very", "long", "prompt")


class InterruptProcessingException(Exception):  # noqa: N818 -- ComfyUI's name
    pass


def install(monkeypatch, folder):
    """Make the modules importable until the test ends.

    Returns:
        What tests look at: ``interrupted`` (set it, and the next check raises) and ``progress`` (bars, as ``[done, total]``).
    """
    state = types.SimpleNamespace(interrupted=False, progress=[])

    def throw_exception_if_processing_interrupted():
        if state.interrupted:
            state.interrupted = False
            raise InterruptProcessingException

    class ProgressBar:
        def __init__(self, total):
            self.row = [0, total]
            state.progress.append(self.row)

        def update(self, value):
            self.row[0] += value

    class KSampler:
        SAMPLERS, SCHEDULERS = ["euler", "heun"], ["normal", "simple"]

    def prepare_noise(latent, seed, batch_index=None):
        return torch.randn(latent.shape, generator=torch.manual_seed(seed))

    def sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=1.0, noise_mask=None, callback=None, **others):
        def interruptible(*_):
            throw_exception_if_processing_interrupted()

        guider = CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sigmas = torch.cat([torch.logspace(1.1, -1, steps), torch.zeros(1)])
        return guider.sample(noise, latent, make_sampler(sampler), sigmas, callback=interruptible, seed=others.get("seed"))

    modules = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            "InterruptProcessingException": InterruptProcessingException,
            "load_models_gpu": lambda models: None,
        },
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.samplers": {"KSampler": KSampler},
        "comfy.sample": {"prepare_noise": prepare_noise, "fix_empty_latent_channels": lambda model, latent: latent, "sample": sample},
        "folder_paths": {"get_temp_directory": lambda: str(folder / "temp"), "get_output_directory": lambda: str(folder / "output")},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return state


class Tokenizer:
    """One token a word: start, words, end, padding to eight."""

    class clip_l:  # noqa: N801 -- ComfyUI's name
        start_token, end_token, pad_token = 0, 1, 1
        inv_vocab: ClassVar = {0: "<|startoftext|>", 1: "<|endoftext|>", **{index + 2: f"{word}</w>" for index, word in enumerate(WORDS)}}


class CLIP:
    tokenizer = Tokenizer()

    def __init__(self):
        self.table = torch.randn(len(WORDS) + 2, 6, generator=torch.Generator().manual_seed(3))

    def tokenize(self, text):
        ids = [0, *(WORDS.index(word) + 2 for word in text.split()), 1]
        return {"l": [[(token, 1.0) for token in ids + [1] * (8 - len(ids))]]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.stack([self.table[token] for token, _ in tokens["l"][0]])[None], {"pooled_output": None}]]


class StandInModel:
    """In the place of a loader."""

    FUNCTION = "load"

    def load(self, memorized=0):
        return make_patcher(), CLIP(), None, "a lighthouse at dusk", "two red apples\na very long prompt\nred dusk"


class Core:
    """ComfyUI's own nodes, as far as the example workflows go."""

    class CLIPTextEncode:
        FUNCTION = "run"

        def run(self, text, clip):
            return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)

    class EmptyLatentImage:
        FUNCTION = "run"

        def run(self, width, height, batch_size):
            return ({"samples": torch.zeros(batch_size, 4, height // 16, width // 16)},)

    class KSampler:
        FUNCTION = "run"

        def run(self, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise):
            sampling = sys.modules["comfy.sample"]
            noise = sampling.prepare_noise(latent_image["samples"], seed)
            made = sampling.sample(model, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent_image["samples"], seed=seed)
            return ({**latent_image, "samples": made.to("cpu", copy=True)},)

    class Through:
        FUNCTION = "run"

        def run(self, **inputs):
            return (next(iter(inputs.values())),)


def core_nodes():
    names = ("CLIPTextEncode", "EmptyLatentImage", "KSampler")
    return {**{name: getattr(Core, name) for name in names}, **dict.fromkeys(("VAEDecode", "SaveImage", "PreviewAny"), Core.Through)}


class Server:
    """Executes graphs, and keeps what did not change."""

    def __init__(self, nodes):
        self.nodes, self.cache = nodes, {}

    def execute(self, graph):
        """What the nodes showed in the browser, and which nodes ran."""
        outputs, shown, ran = {}, {}, []

        def signature(node):
            inputs = graph[node]["inputs"].items()
            return graph[node]["class_type"], tuple(
                (name, (signature(value[0]), value[1]) if isinstance(value, list) else value) for name, value in inputs
            )

        def run(node):
            if node in outputs:
                return outputs[node]
            inputs = {name: run(value[0])[value[1]] if isinstance(value, list) else value for name, value in graph[node]["inputs"].items()}
            key = (node, signature(node))
            if key not in self.cache:
                kind = self.nodes[graph[node]["class_type"]]
                with torch.inference_mode():
                    found = getattr(kind(), kind.FUNCTION)(**inputs)
                self.cache = {old: value for old, value in self.cache.items() if old[0] != node}
                self.cache[key] = found
                ran.append(node)
            found = self.cache[key]
            if isinstance(found, dict):
                shown[node] = found["ui"]
                found = found["result"]
            outputs[node] = found
            return found

        for node in graph:
            run(node)
        self.outputs = outputs
        return shown, ran
