"""Extractors with real network classes of tiny random weights: what they see, what they are called, what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from ccmdist.ccm.phantom import make_phantom
from ccmdist.config.evaluate import ExtractorSettings
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity import extractors
from ccmdist.evaluation.fidelity.appearance import features
from ccmdist.evaluation.fidelity.distances import INCEPTION
from ccmdist.evaluation.fidelity.extractors import (
    CLIP,
    DINOV2,
    FeatureExtractor,
    Inception,
    PatchExtractor,
    Transformer,
    WeightFree,
    chosen,
)
from ccmdist.evaluation.fidelity.networks import tensors_of_pickle

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP, as published; the side of texts is not needed."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = {
        "vocab_size": 50,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "intermediate_size": 32}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return np.stack([make_phantom(group, seed, 64).image for seed, group in enumerate(("Control", "T1NoDPN", "T1DPN"))])


def test_every_extractor_is_one_and_only_networks_see_patches(dinov2, clip):
    found = chosen(ExtractorSettings(dinov2=dinov2, clip=clip))
    assert [one.name for one in found] == [
        "weight-free-logbank-v1",
        "dinov2-class-token-16",
        "clip-image-embedding-12",
    ]
    assert all(isinstance(one, FeatureExtractor) for one in found)
    assert [isinstance(one, PatchExtractor) for one in found] == [False, True, True]
    assert [one.is_of_clip for one in found] == [False, False, True]
    assert chosen(ExtractorSettings(weight_free=False)) == []


@pytest.mark.parametrize("kind", ["weight_free", "dinov2", "clip"])
def test_features_have_the_size_that_is_told_and_do_not_depend_on_the_batch(kind, dinov2, clip, images):
    (extractor,) = chosen(
        ExtractorSettings(**({"weight_free": False} | {kind: {"dinov2": dinov2, "clip": clip}.get(kind, True)}))
    )
    together = extractor.features(images)
    assert together.shape == (3, extractor.dim)
    alone = np.concatenate([extractor.features(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_the_weight_free_features_are_those_of_single_images(images):
    np.testing.assert_array_equal(WeightFree().features(images)[1], features(images[1]))


def test_clip_sees_an_image_as_its_own_processor_shows_it(clip, images):
    shown = [Image.fromarray(image).convert("RGB") for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels).pooler_output
    # PIL scales grey and RGB alike; the processor rescales in another order of operations.
    np.testing.assert_allclose(Transformer(CLIP, clip).features(images), wanted.numpy(), atol=1e-4)


def test_dinov2_gives_the_class_token_of_the_whole_frame_in_imagenet_units(dinov2, images):
    scaled = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in images]
    grey = torch.tensor(np.stack(scaled), dtype=torch.float32)[:, None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(dinov2)(pixel_values=(grey - mean) / std).last_hidden_state[:, 0]
    np.testing.assert_allclose(Transformer(DINOV2, dinov2).features(images), wanted.numpy(), atol=1e-5)


def test_the_image_side_alone_is_enough_for_clip(clip, images, tmp_path):
    whole = CLIPVisionModelWithProjection.from_pretrained(
        clip, config=CLIPVisionConfig.from_pretrained(clip, projection_dim=12)
    )
    whole.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((clip / "preprocessor_config.json").read_bytes())
    alone = Transformer(CLIP, tmp_path)
    np.testing.assert_allclose(alone.features(images), Transformer(CLIP, clip).features(images), atol=1e-6)


@pytest.mark.parametrize("architecture", [DINOV2, CLIP])
def test_the_perceptual_distance_is_zero_for_equal_images_and_grows_with_noise(architecture, dinov2, clip, images):
    extractor = Transformer(architecture, dinov2 if architecture is DINOV2 else clip)
    np.testing.assert_allclose(extractor.perceptual_distance(images, images), 0, atol=1e-6)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=images.shape)
    little, much = (np.clip(images + sd * noise, 0, 255).astype(np.uint8) for sd in (6, 60))
    found = [extractor.perceptual_distance(images, other) for other in (little, much)]
    assert (found[1] > found[0]).all()
    assert (found[1] < 4).all()


def test_the_perceptual_distance_is_the_mean_over_patches_and_four_depths(dinov2, images):
    first, second = images[:1], images[1:2]
    extractor = Transformer(DINOV2, dinov2)
    network = extractor._network
    with torch.no_grad():
        states = [
            network._model(network._inputs(one), output_hidden_states=True).hidden_states for one in (first, second)
        ]
    layers = []
    # Depths of a network of five layers.
    for layer in (1, 2, 4, 5):
        units = [s[layer][0, 1:] / s[layer][0, 1:].norm(dim=-1, keepdim=True) for s in states]
        layers.append(np.mean([float(((a - b) ** 2).sum()) for a, b in zip(*units, strict=True)]))
    assert extractor.perceptual_distance(first, second)[0] == pytest.approx(np.mean(layers), rel=1e-5)


def test_the_hash_is_that_of_weights_config_and_preprocessing(dinov2, tmp_path):
    for file in dinov2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied = Transformer(DINOV2, tmp_path)
    assert copied.sha256 == Transformer(DINOV2, dinov2).sha256
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 42, "width": 42}}))
    shown_otherwise = Transformer(DINOV2, tmp_path)
    assert shown_otherwise.preprocessing.size_px == 42
    before = shown_otherwise.sha256
    assert before != Transformer(DINOV2, dinov2).sha256
    torch.manual_seed(7)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(tmp_path)
    assert Transformer(DINOV2, tmp_path).sha256 != before


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_folder_without_weights_is_told_what_to_place_there(name, tmp_path):
    match = (
        rf"extractors.{name}: .*nothing holds no config.json and no \*.safetensors; place there config.json and "
        r"model.safetensors of a model such as https://huggingface.co/\w+/"
    )
    with pytest.raises(EvaluationError, match=match):
        chosen(ExtractorSettings(**{name: tmp_path / "nothing"}))


def test_a_pickle_alone_is_no_weights(dinov2, tmp_path):
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EvaluationError, match=r"holds no \*.safetensors; .* is converted by save_pretrained"):
        Transformer(DINOV2, tmp_path)


def test_a_model_of_another_kind_is_refused(dinov2, clip, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"config.json has model_type 'dinov2', expected clip or clip_vision_model"
    ):
        Transformer(CLIP, dinov2)
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"extractors.clip: .*config.json is no JSON"):
        Transformer(CLIP, tmp_path)


def test_weights_of_another_size_are_refused_instead_of_drawn_at_random(dinov2, images, tmp_path):
    for file in dinov2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((dinov2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(
        EvaluationError, match=r"extractors.dinov2: .*: missing weights, such as \S*layer.5.*; use config"
    ):
        Transformer(DINOV2, tmp_path).features(images)


def test_missing_weights_of_inception_are_told_by_the_file_to_place_and_where_it_is_published(tmp_path):
    match = r"extractors.inception: there is no weights file .*inception.pth; place there what is published at https://"
    with pytest.raises(EvaluationError, match=match):
        chosen(ExtractorSettings(inception=tmp_path / "inception.pth"))


def test_inception_without_torch_fidelity_is_told_by_the_extra_to_install(tmp_path, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (tmp_path / "inception.pth").write_bytes(b"anything")
    with pytest.raises(EvaluationError, match=r"torch-fidelity cannot be imported here .*ccmdist\[fidelity\]"):
        Inception(tmp_path / "inception.pth").features(images)
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"torch_fidelity is not installed here; .*ccmdist\[fidelity\]"):
        chosen(ExtractorSettings(inception=tmp_path / "inception.pth"))


def test_inception_of_other_weights_has_another_name_so_that_no_fid_is_told_of_it(tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"not what is published")
    extractor = Inception(tmp_path / "inception.pth")
    assert extractor.name == "inception-v3-other-weights" != INCEPTION
    assert len(extractor.sha256) == 64


@pytest.fixture
def inception_module():
    """torch-fidelity where it can be imported: it needs torchvision."""
    return pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)


def test_inception_gives_what_torch_fidelity_gives(inception_module, images, tmp_path, monkeypatch):
    torch.manual_seed(3)
    kind, weights = inception_module.FeatureExtractorInceptionV3, tmp_path / "inception.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        torch.save({}, weights)
        network = kind("inception", ["2048"], feature_extractor_weights_path=str(weights))
    torch.save(network.state_dict(), weights)
    (wanted,) = network(torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1))
    np.testing.assert_allclose(Inception(weights).features(images), wanted.numpy(), rtol=1e-5, atol=1e-6)
    torch.save({"fc.weight": torch.zeros(2)}, weights)
    with pytest.raises(EvaluationError, match="does not hold the weights of torch-fidelity's Inception; copy"):
        Inception(weights).features(images)


class Trap:
    """Runs code of its own when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["trap", "text", "cut"])
def test_a_weights_file_that_holds_more_than_tensors_is_refused_and_runs_nothing(content, tmp_path):
    weights, sprung = tmp_path / "inception.pth", tmp_path / "sprung"
    torch.save({"trap": Trap(sprung)} if content == "trap" else {"weights": "text"}, weights)
    if content == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EvaluationError, match=r"inception.pth does not hold the weights of torch-fidelity's Inception"):
        tensors_of_pickle(weights)
    assert not sprung.exists()
