"""The tiny model, made once, and adapters on it that have moved."""

import pytest
import torch

from ccmdist.adapters.state import AdapterState
from ccmdist.config.train import GrowthSettings, LoRASettings, WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder

SETTINGS = {
    "wdlora": WDLoRASettings(lora_rank=4, alpha=8.0),
    "lora": LoRASettings(lora_rank=4, alpha=6.0, targets=("attn",)),
    # 0.7 / 3 is a scale whose multiples are rounded.
    "selora": LoRASettings(lora_rank=6, alpha=0.7, growth=GrowthSettings(start_rank=3)),
    "se-wdlora": WDLoRASettings(lora_rank=6, alpha=8.0, growth=GrowthSettings()),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny model, weights in bf16."""
    path = tmp_path_factory.mktemp("model")
    make_model("tiny", "2509", path)
    return ModelFolder.open(path)


@pytest.fixture(params=["lora", "wdlora"])
def moved(request, tiny):
    """An adapter of each kind whose alpha is not its rank, well away from its base."""
    return moved_state(tiny, SETTINGS[request.param])


@pytest.fixture(params=list(SETTINGS))
def trained(request, tiny):
    """The same of each kind, with ranks that have grown, of random size from 1 to the largest, and without."""
    return moved_state(tiny, SETTINGS[request.param])


def moved_state(folder, settings):
    source = torch.Generator().manual_seed(5)
    model = mmdit.build(folder, torch.float32, None)
    tensors = {}
    for name in mmdit.linear_names(model, settings.targets):
        W, rank = model.get_submodule(name).weight.detach(), settings.lora_rank
        if settings.growth:
            rank = int(torch.randint(1, rank + 1, (), generator=source))
        tensors[name] = {
            "lora_A": torch.randn(rank, W.shape[1], generator=source) / W.shape[1] ** 0.5,
            "lora_B": 0.05 * torch.randn(W.shape[0], rank, generator=source),
        }
        if settings.kind == "wdlora":
            tensors[name]["magnitude"] = W.norm(dim=1) * (1 + 0.1 * torch.randn(W.shape[0], generator=source))
    facts = {"base_digest": folder.transformer_digest(), "data_digest": "d" * 64, "step": "7", "model_version": "2509"}
    return AdapterState(settings, tensors, facts)


@pytest.fixture
def velocity_of():
    """What a transformer predicts on inputs that are always the same."""

    def predict(model):
        source = torch.Generator().manual_seed(1)
        latents = torch.randn(2, 2, 16, 64, generator=source)
        prompt_embeds = torch.randn(2, 5, model.config.joint_attention_dim, generator=source)
        sigma = torch.tensor([0.2, 0.9])
        with torch.no_grad():
            return mmdit.velocity(model, latents[0], latents[1], prompt_embeds, sigma, (4, 4), (4, 4))

    return predict
