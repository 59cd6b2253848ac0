"""A model in one process gets exactly the weights that the files hold, each row once, or is refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ccmdist.adapters.injection import RowSquares, row_squares_of
from ccmdist.errors import ModelError
from ccmdist.models import checkpoint_io, mmdit
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.quantized import build_quantized
from ccmdist.models.tabulation import table_for


def small_model(dtype=torch.float32):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 5)).to(dtype)
    model.register_buffer("passing", torch.full((2,), 7.0), persistent=False)
    return model


def stored(tmp_path, tensors):
    save_file(tensors, tmp_path / "weights.safetensors")
    return dict.fromkeys(tensors, tmp_path / "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_stored_one_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    expected = small_model(dtype).state_dict()
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    model = small_model(dtype)
    del tensors["1.num_batches_tracked"]  # a scalar has no rows; no part of Qwen-Image-Edit has one
    model[1].num_batches_tracked = None
    num_bytes = load_weights(model, stored(tmp_path, tensors))
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in tensors)
    assert model.passing.tolist() == [7.0, 7.0], "buffers that are not stored are left alone"


@pytest.mark.parametrize("elements_at_once", [1, 1000, 1 << 24])
def test_every_row_is_told_once_however_few_are_read_at_a_time(tiny_models, monkeypatch, elements_at_once):
    monkeypatch.setattr(checkpoint_io, "MAX_ELEMENTS_AT_ONCE", elements_at_once * 16)
    folder = ModelFolder.open(tiny_models["2511"])
    seen = {}

    def on_rows(name, first, rows, num_rows):
        seen.setdefault(name, torch.zeros(num_rows, rows.shape[1]))[first : first + len(rows)] += rows

    model = mmdit.build(folder, torch.float32, None, on_rows)
    weights = model.state_dict()
    files = set(folder.weight_files("transformer").values())
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert seen.keys() == weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].float()) for name in seen)
    assert all(torch.equal(seen[name], weights[name].view(len(seen[name]), -1)) for name in seen)


def test_norms_of_rows_collected_on_the_way_are_those_of_the_model(tiny_models):
    folder = ModelFolder.open(tiny_models["2509"])
    names = mmdit.linear_names(mmdit.skeleton(folder), ("attn", "mlp"))
    for dtype in (torch.float32, torch.bfloat16):
        squares = RowSquares(names)
        model = mmdit.build(folder, dtype, None, squares.on_rows)
        expected, found = row_squares_of(model, names), squares.reduce()
        assert list(found) == names
        assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_a_part_of_a_model_folder_is_loaded_as_diffusers_loads_it(tiny_models, component):
    import diffusers

    folder = ModelFolder.open(tiny_models["2509"])
    kind = {"vae": diffusers.AutoencoderKLQwenImage, "transformer": diffusers.QwenImageTransformer2DModel}[component]
    expected = kind.from_pretrained(folder.path / component, torch_dtype=torch.bfloat16).state_dict()
    model = kind.from_config(folder.config(component)).to(torch.bfloat16)
    load_weights(model, folder.weight_files(component))
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight"), "the weights do not fit Linear: missing weight"),
        (lambda t: t.update(extra=torch.ones(1)), "the weights do not fit Linear: unexpected extra"),
        (
            lambda t: t.update({f"extra{index}": torch.ones(1) for index in range(5)}),
            "the weights do not fit Linear: unexpected extra0, extra1, extra2 and 2 more",
        ),
        (
            lambda t: t.update(weight=torch.ones(4, 5)),
            "weights.safetensors: the weights do not fit Linear: weight has shape (4, 5), expected (5, 4)",
        ),
        (
            lambda t: t.update(weight=torch.ones(20)),
            "weights.safetensors: the weights do not fit Linear: weight has shape (20,), expected (5, 4)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, change, message):
    model = torch.nn.Linear(4, 5)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    with pytest.raises(ModelError, match=re.escape(message)) as problem:
        load_weights(model, stored(tmp_path, tensors))
    assert str(tmp_path) in str(problem.value)
    assert str(problem.value).endswith("; use config.json and weights of the same checkpoint")


def test_a_config_of_another_size_is_refused_before_anything_runs(tiny_copy):
    file = tiny_copy / "transformer/config.json"
    file.write_text(file.read_text().replace('"num_layers": 4', '"num_layers": 5'))
    with pytest.raises(ModelError, match=r"do not fit QwenImageTransformer2DModel: missing transformer_blocks\.4\."):
        mmdit.build(ModelFolder.open(tiny_copy), torch.float32, None)
    with pytest.raises(ModelError, match=r"do not fit QwenImageTransformer2DModel: missing transformer_blocks\.4\."):
        build_quantized(ModelFolder.open(tiny_copy), torch.bfloat16, "int8", "cpu", None)
    sigmas, device = torch.tensor([0.5]), torch.device("cpu")
    with pytest.raises(ModelError, match=r"do not fit \w+: missing transformer_blocks\.4\.img_mod\.1\.bias"):
        table_for(ModelFolder.open(tiny_copy), sigmas, torch.bfloat16, 1, device, "of another size")


def test_weights_are_those_of_the_files_not_what_the_class_draws(tiny_copy):
    file = tiny_copy / "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"
    tensors = load_file(file)
    tensors["img_in.weight"].fill_(0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    model = mmdit.build(ModelFolder.open(tiny_copy), torch.float32, None)
    assert (model.img_in.weight == 0.5).all()
