"""LPIPS without torchvision: equal to the plain way of writing it down, and refusing what is not VGG16."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ccmdist.errors import ModelError
from ccmdist.models.perceptual import Perceptual

# As torchvision numbers the layers of vgg16().features: convolutions, and after which of them LPIPS looks.
CONVOLUTIONS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
POOLS, LOOKS = (4, 9, 16, 23), (3, 8, 15, 22, 29)


@pytest.fixture(scope="module")
def tensors():
    source, before, made = torch.Generator().manual_seed(0), 3, {}
    for place, channels in CONVOLUTIONS.items():
        weight = torch.randn(channels, before, 3, 3, generator=source) * (2 / (9 * before)) ** 0.5
        made |= {f"features.{place}.weight": weight, f"features.{place}.bias": torch.zeros(channels)}
        before = channels
    return made | {"classifier.0.bias": torch.zeros(3)}


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(tensors, file)
    return file


def pictures(seed=0):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plainly(tensors, heads, first, second):
    """The distance as the paper has it, layer by layer."""
    total = torch.zeros(len(first))
    both = [(x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) for x in (first, second)]
    both = [x / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1) for x in both]
    for place in range(30):
        if place in CONVOLUTIONS:
            weight, bias = tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"]
            both = [F.conv2d(x, weight, bias, padding=1) for x in both]
        else:
            both = [F.max_pool2d(x, 2, 2) if place in POOLS else F.relu(x) for x in both]
        if place in LOOKS:
            one, two = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in both)
            total += ((one - two) ** 2 * heads[LOOKS.index(place)]).sum(1).mean((1, 2))
    return total


def test_the_distance_is_that_of_the_paper(tensors, weights):
    distance, first, second = Perceptual(weights), pictures(), pictures(1)
    heads = [getattr(distance, f"head_{index}") for index in range(5)]
    assert [head.shape[1] for head in heads] == [64, 128, 256, 512, 512]
    assert all((head >= 0).all() for head in heads)
    found, expected = distance(first, second), plainly(tensors, heads, first, second)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_equal_pictures_have_no_distance_more_noise_gives_more_and_a_gradient_flows(weights):
    distance, given = Perceptual(weights), pictures()
    noise = pictures(1)
    found = [float(distance(given, given + scale * noise).mean()) for scale in (0, 0.1, 0.3, 1)]
    assert found[0] == 0
    assert found == sorted(found)
    moved = torch.full_like(given, -1).requires_grad_()
    distance(moved, given).sum().backward()
    assert moved.grad.isfinite().all()
    assert moved.grad.abs().sum() > 0
    assert not [name for name, parameter in distance.named_parameters() if parameter.requires_grad]


def test_both_kinds_of_file_give_the_same_network(tensors, weights, tmp_path):
    save_file(tensors, tmp_path / "vgg.safetensors")
    first, second = Perceptual(weights).state_dict(), Perceptual(tmp_path / "vgg.safetensors").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_files_that_are_not_vgg16_are_refused(tensors, tmp_path):
    file = tmp_path / "x.pth"
    with pytest.raises(ModelError, match=r"x.pth: cannot be read as weights \(.*; set objective.perceptual_weights to"):
        Perceptual(file)
    file.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"x.pth: cannot be read as weights \("):
        Perceptual(file)
    torch.save({"a": 1}, file)
    with pytest.raises(ModelError, match=r"x.pth: holds other things than named tensors"):
        Perceptual(file)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "features.28.bias"}, file)
    with pytest.raises(ModelError, match=r"is not VGG16: features.28.bias is missing, expected \(512,\)"):
        Perceptual(file)
    torch.save(tensors | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, file)
    with pytest.raises(ModelError, match=r"features.0.weight is of shape \(64, 1, 3, 3\), expected \(64, 3, 3, 3\)"):
        Perceptual(file)
