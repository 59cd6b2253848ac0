"""What `model make` writes is a complete Qwen-Image-Edit checkpoint that stock libraries load."""

import json
import re
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from ccmdist.errors import ConfigError, ModelError
from ccmdist.models import make
from ccmdist.models.make import make_model, parts_of, random_tensor, write_parts
from ccmdist.models.sizes import PIPELINES, SIZES

VERSIONS = ["v1", "2509", "2511"]
LAYOUT = {
    "model_index.json",
    "processor/processor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors.index.json",
}


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def pipeline_of(folder, version, **parts):
    import diffusers

    from ccmdist.models.processor import load_processor

    return getattr(diffusers, PIPELINES[version]).from_pretrained(
        folder, processor=load_processor(folder), local_files_only=True, torch_dtype=torch.float32, **parts
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stock_classes_load_every_part(tiny_models, version):
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    folder = tiny_models[version]
    assert set(bytes_of(folder)) >= LAYOUT
    parts = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    for component, kind in parts.items():
        module, loading = kind.from_pretrained(folder / component, output_loading_info=True, local_files_only=True)
        assert not any(loading.values()), f"{component}: {loading}"
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == json.loads(
        (folder / "text_encoder/config.json").read_text()
    ).get("image_token_id")
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift_terminal == 0.02


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stock_pipeline_of_the_version_loads_the_folder(tiny_models, version):
    pipeline = pipeline_of(tiny_models[version], version)
    assert type(pipeline).__name__ == PIPELINES[version]
    assert pipeline.transformer.config.zero_cond_t == (version == "2511")
    index = json.loads((tiny_models[version] / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"], "a download names the class every reader has"


def test_the_stock_pipeline_draws_an_image(tiny_models):
    pipeline = pipeline_of(tiny_models["2511"], "2511")
    pipeline.set_progress_bar_config(disable=True)
    mask = Image.new("RGB", (64, 64))
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "true_cfg_scale": 1.0, "output_type": "np"}
    image = pipeline(image=mask, prompt="a frame", generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01, "random weights draw something that is not flat"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tiny_models, tmp_path):
    make_model("tiny", "2509", tmp_path / "again")
    make_model("tiny", "2509", tmp_path / "other", seed=1)
    expected, again, other = map(bytes_of, (tiny_models["2509"], tmp_path / "again", tmp_path / "other"))
    assert again == expected
    weights = {name for name in expected if name.endswith(".safetensors")}
    assert {name for name in expected if other[name] != expected[name]} == weights


def test_a_weight_depends_on_its_name_shape_and_seed_alone():
    first = random_tensor("a.weight", torch.Size([4, 3]), seed=0)
    random_tensor("b.weight", torch.Size([4, 3]), seed=0)
    torch.manual_seed(5)
    assert torch.equal(first, random_tensor("a.weight", torch.Size([4, 3]), seed=0))
    assert not torch.equal(first, random_tensor("b.weight", torch.Size([4, 3]), seed=0))
    assert not torch.equal(first, random_tensor("a.weight", torch.Size([4, 3]), seed=1))


def test_weights_keep_the_size_of_signals():
    wide = random_tensor("a.weight", torch.Size([64, 1024]), seed=0).float()
    assert abs(float(wide.std()) * 32 - 1) < 0.02, "variance 1 / fan-in"
    assert torch.equal(random_tensor("norm.weight", torch.Size([8]), seed=0), torch.ones(8, dtype=torch.bfloat16))
    assert torch.equal(random_tensor("a.gamma", torch.Size([8, 1, 1]), 0), torch.ones(8, 1, 1, dtype=torch.bfloat16))
    assert not random_tensor("a.bias", torch.Size([8]), seed=0).any()


def test_a_folder_that_holds_a_model_is_refused_and_left_as_it_is(tiny_copy):
    before = bytes_of(tiny_copy)
    with pytest.raises(ModelError, match="already holds a model; choose another folder"):
        make_model("tiny", "2509", tiny_copy, seed=1)
    assert bytes_of(tiny_copy) == before


def test_an_interrupted_make_is_made_anew_by_the_same_call(tiny_models, tmp_path, monkeypatch):
    made = []

    def interrupted(name, shape, seed):
        made.append(name)
        if len(made) == 150:
            raise KeyboardInterrupt
        return random_tensor(name, shape, seed)

    monkeypatch.setattr(make, "random_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_model("tiny", "2509", tmp_path / "model")
    assert not (tmp_path / "model" / "model_index.json").exists(), "half a model is no model"
    make_model("tiny", "2509", tmp_path / "model")
    assert bytes_of(tmp_path / "model") == bytes_of(tiny_models["2509"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge", "2509"), "--size: 'huge' is not known; use one of tiny, small, full-width-2-blocks, full"),
        (("tiny", "2510"), "--version: '2510' is not known; use one of v1, 2509, 2511"),
        (
            ("small", "2509", 0, True),
            "--fitted: there are no fitted weights of size small with seed 0; use --size tiny --seed 0, "
            "or make it without --fitted",
        ),
        (("tiny", "2509", 3, True), "--fitted: there are no fitted weights of size tiny with seed 3"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused_before_anything_is_written(tmp_path, arguments, message):
    size, version, *rest = arguments
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_model(size, version, tmp_path / "model", *rest)
    assert not (tmp_path / "model").exists()


def test_fitted_weights_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FITTED", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"none/vae holds no fitted weights; make them with `ccmdist model fit`"):
        make_model("tiny", "2509", tmp_path / "model", fitted=True)


def test_everyone_who_may_read_the_config_may_read_the_weights(tiny_models):
    modes = {file.stat().st_mode for file in tiny_models["2509"].rglob("*") if file.is_file()}
    assert len(modes) == 1, "safetensors makes its files unreadable for a group that shares the model"


def test_files_stay_below_the_limit_unless_a_single_tensor_does_not():
    shapes = {"a": torch.Size([10]), "b": torch.Size([30]), "c": torch.Size([100]), "d": torch.Size([5])}
    assert parts_of(shapes, bytes_per_file=80) == [["a", "b"], ["c"], ["d"]]


def test_only_the_tensors_of_one_file_are_held_at_a_time(tmp_path):
    alive = []

    def parts():
        for index in range(3):
            assert not any(reference() for reference in alive), "the tensors of the file before are still held"
            tensor = torch.zeros(4)
            alive.append(weakref.ref(tensor))
            yield {f"weight{index}": tensor}
            del tensor

    write_parts(tmp_path, "model", parts(), 3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"]["weight2"] == "model-00003-of-00003.safetensors"


def test_a_model_is_made_in_the_memory_of_one_file(tmp_path, monkeypatch):
    alive, peaks = [0], [0]

    def forget(num_bytes):
        alive[0] -= num_bytes

    def counted(name, shape, seed):
        tensor = random_tensor(name, shape, seed)
        alive[0] += tensor.nbytes
        peaks.append(alive[0])
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(make, "random_tensor", counted)
    make_model("tiny", "2509", tmp_path / "model")
    written = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.safetensors"))
    assert written > 5 * SIZES["tiny"].bytes_per_file
    assert 0 < max(peaks) <= SIZES["tiny"].bytes_per_file


MEASURED = """
import resource, sys
from pathlib import Path
from ccmdist.models.make import make_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
make_model(sys.argv[1], "2509", Path(sys.argv[2]))
print(before, peak())
"""


def peak_bytes(size, folder):
    """Peak memory of a process before and after it makes a model, and the bytes it wrote."""
    command = [sys.executable, "-c", MEASURED, size, str(folder)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    before, after = map(int, ended.stdout.split()[-2:])
    return before, after, written


@pytest.mark.drill
def test_two_blocks_of_full_width_need_the_memory_of_one_file(tmp_path):
    before, after, written = peak_bytes("full-width-2-blocks", tmp_path / "model")
    assert written > 2.5e9
    assert after < 4 << 30
    # A file of 1 GiB, and one tensor twice while it is drawn.
    assert after - before < 1.5 * SIZES["full-width-2-blocks"].bytes_per_file


def test_the_full_model_has_the_parameters_of_the_published_one():
    from transformers import Qwen2_5_VLForConditionalGeneration

    from ccmdist.models.make import make_transformer, make_vae, text_config
    from ccmdist.models.tokenizer import make_tokenizer

    full = SIZES["full"]
    with torch.device("meta"):
        modules = [make_transformer(full, "2511"), make_vae(full)]
        modules.append(Qwen2_5_VLForConditionalGeneration(text_config(full, make_tokenizer())))
    assert sum(p.numel() for p in modules[0].parameters()) == 20_430_401_088
    assert sum(p.numel() for p in modules[2].parameters()) == 8_292_166_656, "that of Qwen2.5-VL-7B"
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in modules]
    total = sum(2 * shape.numel() for part in shapes for shape in part.values())
    assert 57.5e9 < total < 58.5e9
    for part in shapes:
        files = parts_of(part, full.bytes_per_file)
        assert [name for names in files for name in names] == list(part), "each tensor is planned once"
        sizes = [sum(2 * part[name].numel() for name in names) for names in files]
        assert all(size <= full.bytes_per_file or len(names) == 1 for size, names in zip(sizes, files, strict=True))
