"""The adapter on the language model of an MDF-MLLM, by itself: what PEFT can read."""

from typing import Final

from torch import Tensor

from ccmdist.adapters.state import AdapterState
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.config.train import AdapterSettings, LoRASettings, WDLoRASettings
from ccmdist.models.mdf_base import LLM
from ccmdist.models.network_state import NetworkState

LLM_ADAPTER: Final = "llm_adapter"
"""Its folder, in that of the network."""


def adapter_of(settings: DiagnoseSettings) -> AdapterSettings | None:
    """The adapter on the language model, if there is one."""
    if settings.llm == "wdlora":
        return WDLoRASettings(lora_rank=settings.lora_rank)
    return LoRASettings(lora_rank=settings.lora_rank) if settings.llm == "lora" else None


def llm_adapter(state: NetworkState) -> AdapterState | None:
    """The adapter on the language model that a network holds, by the names of that model's linears, if there is one."""
    settings = state.about.settings
    assert isinstance(settings, DiagnoseSettings), state.about.kind
    if (of_adapter := adapter_of(settings)) is None:
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.tensors.items():
        if name.startswith(f"{LLM}."):
            linear, _, kind = name.removeprefix(f"{LLM}.").rpartition(".")
            found.setdefault(linear, {})[kind] = tensor
    return AdapterState(of_adapter, found, state.about.facts)
