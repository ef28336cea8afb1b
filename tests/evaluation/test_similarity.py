"""Copy similarity and CLIP scores by networks that the caller names, on tiny random ones."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from memhook.errors import MemhookError
from memhook.evaluation.similarity import Descriptor, image_similarity, load_clip, load_descriptor


def pictures(count, seed=0, size=(40, 24)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


class Pooled(torch.nn.Module):
    """A picture's mean over each cell of a grid of 4 by 4."""

    def forward(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "pooled.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Pooled(), torch.rand(2, 3, 16, 16)).save(str(path))
    return path


def test_a_picture_is_its_own_copy_and_others_are_less_alike(script):
    descriptor = load_descriptor(script, size=32)
    images = pictures(5)
    vectors = descriptor(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(image_similarity(images, images, descriptor), torch.ones(5))
    assert (image_similarity(images, pictures(5, seed=1), descriptor) < 0.999).all()


def test_torchscript_gives_what_the_network_itself_gives_on_normalized_pixels(script):
    [image] = pictures(1, size=(32, 32))
    seen = []
    Descriptor(lambda pixels: seen.append(pixels) or Pooled()(pixels), size=32)([image])
    expected = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # by hand; 32 pixels need no resizing
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(load_descriptor(script, size=32)([image]), torch.nn.functional.normalize(Pooled()(seen[0])))


def test_batches_do_not_matter(script):
    images = pictures(5)
    torch.testing.assert_close(load_descriptor(script, size=32, batch_size=2)(images), load_descriptor(script, size=32)(images))


def test_bad_descriptors(script, tmp_path):
    with pytest.raises(MemhookError, match=r"there is no file .*missing\.pt; name a TorchScript"):
        load_descriptor(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(MemhookError, match=r"text\.pt is no TorchScript file"):
        load_descriptor(tmp_path / "text.pt")
    with pytest.raises(MemhookError, match=r"gave shape \(1, 3, 8, 8\)"):
        Descriptor(lambda pixels: pixels, size=8)(pictures(1))
    with pytest.raises(MemhookError, match="no images"):
        load_descriptor(script)([])
    with pytest.raises(MemhookError, match="2 images and 1 to compare"):
        image_similarity(pictures(2), pictures(1), load_descriptor(script))


def field(number, value):
    """A field of a protocol buffer: an int, or bytes with their length."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def tensor_info(name, rank):
    shape = b"".join(field(1, field(2, b"n%d" % axis)) for axis in range(rank))
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))


def onnx_bytes():
    """A model of one node, ``ReduceMean`` over height and width, written by hand."""
    axes = field(1, b"axes") + b"".join(field(8, axis) for axis in (2, 3)) + bytes([20 << 3 & 0x7F | 0x80, 1, 7])
    keep = field(1, b"keepdims") + field(3, 0) + bytes([20 << 3 & 0x7F | 0x80, 1, 2])
    node = field(1, b"x") + field(2, b"y") + field(4, b"ReduceMean") + field(5, axes) + field(5, keep)
    graph = field(1, node) + field(2, b"g") + field(11, tensor_info(b"x", 4)) + field(12, tensor_info(b"y", 2))
    return field(1, 8) + bytes([7 << 3 | 2, len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph + field(8, field(2, 13))


def test_onnx_gives_what_the_same_arithmetic_gives(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "mean.onnx"
    path.write_bytes(onnx_bytes())
    images, seen = pictures(3), []
    Descriptor(lambda pixels: seen.append(pixels) or Pooled()(pixels), size=16)(images)
    expected = torch.nn.functional.normalize(seen[0].mean(dim=(2, 3)))
    torch.testing.assert_close(load_descriptor(path, size=16)(images), expected)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(MemhookError, match=r"text\.onnx is no ONNX file"):
        load_descriptor(tmp_path / "text.onnx")


def test_onnx_without_its_runtime_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    (tmp_path / "some.onnx").write_bytes(b"")
    with pytest.raises(MemhookError, match="pip install onnxruntime"):
        load_descriptor(tmp_path / "some.onnx")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model with random weights of 16 units, its processor, and a vocabulary of letters, as folders of users hold them."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [chr(97 + number) for number in range(26)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}))
    return folder


def test_a_clip_score_is_the_cosine_that_the_model_computes(clip_folder):
    score = load_clip(str(clip_folder))
    images, prompts = pictures(3), ["a fox", "an owl", "two cats by the sea at night"]  # the last one is longer than the window
    scores = score(images, prompts)
    # One pair at a time, from the two towers.
    for image, prompt, found in zip(images, prompts, scores, strict=True):
        pixels = score.processor(images=[image], return_tensors="pt")["pixel_values"]
        ids = score.tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        vision = score.model.visual_projection(score.model.vision_model(pixel_values=pixels).pooler_output)
        text = score.model.text_projection(score.model.text_model(input_ids=ids).pooler_output)
        assert float(torch.cosine_similarity(vision, text)) == pytest.approx(float(found), abs=1e-5)
    torch.testing.assert_close(load_clip(str(clip_folder), batch_size=1)(images, prompts), scores, atol=1e-5, rtol=0)
    assert len({round(float(value), 4) for value in score(images[:1] * 3, prompts)}) == 3  # the text matters


def test_bad_clip(clip_folder, tmp_path):
    with pytest.raises(MemhookError, match="1 images and 2 prompts"):
        load_clip(str(clip_folder))(pictures(1), ["a", "b"])
    with pytest.raises(MemhookError, match="cannot load CLIP from"):
        load_clip(str(tmp_path))
