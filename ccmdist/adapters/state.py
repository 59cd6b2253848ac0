"""An adapter as values, and as a folder that stock diffusers, PEFT and people can read.

FOLDER/
  pytorch_lora_weights.safetensors   what `pipe.load_lora_weights(FOLDER)` loads
  adapter_config.json                the same settings, as PEFT's own loader reads them
  README.md                          model card

The names of tensors and settings are PEFT's. The settings lie in the weight file itself, as
``lora_adapter_metadata``: without them diffusers takes alpha for the lora_rank, and says nothing.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ccmdist.adapters.model_card import model_card
from ccmdist.commit import commit_json, commit_text, committed_file
from ccmdist.config.train import AdapterSettings
from ccmdist.errors import AdapterError

WEIGHTS_FILE: Final = "pytorch_lora_weights.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
CARD_FILE: Final = "README.md"
FORMAT_VERSION: Final = 1

PREFIX: Final = "transformer."
PEFT_FILE: Final = "adapter_model.safetensors"
PEFT_PREFIX: Final = "base_model.model."
PEFT_NAMES: Final = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_METADATA, OUR_METADATA = "lora_adapter_metadata", "ccmdist"
REMEDY: Final = "export it again with `ccmdist adapter export`"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Name of an adapted linear -> "lora_A" (r, in), "lora_B" (out, r) and, for WDLoRA, "magnitude" (out,). Where ranks
grow, every linear has an r of its own, the active ranks alone."""


@dataclass(frozen=True)
class AdapterState:
    """A trained adapter.

    Attributes:
        settings: Kind, lora_rank, alpha, targets; where ranks grow, lora_rank is the largest that is allowed.
        tensors: fp32, on the CPU.
        facts: Where it comes from: "base_digest", "data_digest", "config_digest", "step", "model_version",
            "image_size_px" and so on, all as text.
    """

    settings: AdapterSettings
    tensors: Tensors
    facts: Mapping[str, str]

    @property
    def scale(self) -> float:
        """s, by which B A is multiplied."""
        return self.settings.scale

    @property
    def lora_ranks(self) -> dict[str, int]:
        """Name of an adapted linear -> its r."""
        return {name: len(tensors["lora_A"]) for name, tensors in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        """Trained numbers, over all linears."""
        return sum(tensor.numel() for tensors in self.tensors.values() for tensor in tensors.values())

    def check(self, where: Path) -> None:
        """Refuse tensors that are missing, of the wrong shape or not finite.

        Args:
            where: What a message names.

        Raises:
            AdapterError: Naming the tensor.
        """
        if not self.tensors:
            raise AdapterError(f"{where}: adapts nothing", REMEDY)
        for name, tensors in self.tensors.items():
            for problem in _problems(self.settings, tensors):
                raise AdapterError(f"{where}: {name}: {problem}", REMEDY)

    def check_fits(self, shapes: Mapping[str, Sequence[int]], where: Path) -> None:
        """Refuse a base whose linears are not those that were adapted.

        Args:
            shapes: Name of every linear of the base -> (out, in).
            where: The base, as a message names it.

        Raises:
            AdapterError: Naming the first linear that does not fit.
        """
        for name, tensors in self.tensors.items():
            adapted = (len(tensors["lora_B"]), tensors["lora_A"].shape[1])
            if (found := tuple(shapes.get(name, ()))) != adapted:
                what = f"is {_text(found)}" if found else "is missing"
                raise AdapterError(
                    f"{where}: linear {name} {what}, the adapter expects {_text(adapted)} (out x in)",
                    "give the model that the adapter was trained on",
                )


def write_adapter(folder: Path, state: AdapterState) -> None:
    """Write an adapter as a folder that ``pipe.load_lora_weights`` loads; each file appears complete or not at all.

    Raises:
        AdapterError: If the state itself is not sound.
    """
    state.check(folder)
    tensors = _named(state, PREFIX)
    ours = {
        "format_version": FORMAT_VERSION,
        "settings": state.settings.model_dump(mode="json"),
        "facts": dict(state.facts),
    }
    peft = json.dumps({PREFIX + key: value for key, value in peft_settings(state).items()}, sort_keys=True)
    metadata = {"format": "pt", PEFT_METADATA: peft, OUR_METADATA: json.dumps(ours, sort_keys=True)}
    with committed_file(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    commit_json(folder / CONFIG_FILE, {"peft_type": "LORA", "inference_mode": True} | peft_settings(state))
    card = model_card(state.settings, state.lora_ranks, state.num_parameters, state.facts, WEIGHTS_FILE)
    commit_text(folder / CARD_FILE, card)


def write_peft(folder: Path, state: AdapterState) -> None:
    """Write an adapter as a folder that ``PeftModel.from_pretrained`` of PEFT loads, on any model with these linears.

    Raises:
        AdapterError: If the state itself is not sound.
    """
    state.check(folder)
    with committed_file(folder / PEFT_FILE) as temporary:
        save_file(_named(state, PEFT_PREFIX), temporary, metadata={"format": "pt"})
    commit_json(folder / CONFIG_FILE, {"peft_type": "LORA", "inference_mode": True} | peft_settings(state))


def _named(state: AdapterState, prefix: str) -> dict[str, Tensor]:
    """All tensors, fp32, by PEFT's names below a prefix."""
    return {
        f"{prefix}{name}.{PEFT_NAMES[kind]}": tensor.float().contiguous()
        for name, kind, tensor in _items(state.tensors)
    }


def read_adapter(folder: Path) -> AdapterState:
    """The adapter that :func:`write_adapter` wrote to ``folder``.

    Raises:
        AdapterError: If a file is missing, cut short or does not hold what it should.
    """
    file = folder / WEIGHTS_FILE
    metadata, stored = _read(file)
    settings, facts = _described(file, metadata)
    state = AdapterState(settings, _by_linear(file, stored), facts)
    state.check(file)
    if json.loads(metadata[PEFT_METADATA]) != {PREFIX + key: value for key, value in peft_settings(state).items()}:
        raise AdapterError(f"{file}: its {PEFT_METADATA} is not that of its tensors and settings", REMEDY)
    return state


def peft_settings(state: AdapterState) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig. The targets are whole names, so no pattern can catch one linear too many.

    r and lora_alpha are those of the most common rank; only linears of another have patterns, so that PEFT, which
    compares each linear with every pattern, has few to look through. diffusers takes the prefix off the settings'
    names and leaves those in the patterns as they are, so these are without it.
    """
    ranks, alpha_of = state.lora_ranks, state.settings.alpha_of
    counts = Counter(ranks.values())
    common = min(counts, key=lambda rank: (-counts[rank], rank))
    others = {name: ranks[name] for name in sorted(ranks, key=_natural) if ranks[name] != common}
    patterns = {"rank_pattern": others, "alpha_pattern": {name: alpha_of(rank) for name, rank in others.items()}}
    return {
        "r": common,
        "lora_alpha": alpha_of(common),
        "use_dora": state.settings.kind == "wdlora",
        "target_modules": sorted(state.tensors, key=_natural),
        "lora_dropout": 0.0,
        "bias": "none",
    } | (patterns if others else {})


def _problems(settings: AdapterSettings, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the tensors of one linear."""
    expected_kinds = {"lora_A", "lora_B"} | ({"magnitude"} if settings.kind == "wdlora" else set())
    if expected_kinds != tensors.keys():
        yield f"holds {', '.join(sorted(tensors))}, expected {', '.join(sorted(expected_kinds))}"
        return
    rank = len(tensors["lora_A"]) if settings.growth else settings.lora_rank
    if not 1 <= rank <= settings.lora_rank:
        yield f"has rank {rank}, expected 1 to {settings.lora_rank}"
        return
    num_rows, num_columns = tensors["lora_B"].shape[0], tensors["lora_A"].shape[-1]
    shapes = {"lora_A": (rank, num_columns), "lora_B": (num_rows, rank), "magnitude": (num_rows,)}
    for kind, tensor in tensors.items():
        if tensor.shape != shapes[kind]:
            yield f"{kind} is {_text(tensor.shape)}, expected {_text(shapes[kind])}"
        elif not tensor.isfinite().all():
            yield f"{kind} holds values that are not finite"


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not file.is_file():
        raise AdapterError(f"{file}: is missing", "give the folder of an exported adapter, or " + REMEDY)
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{file}: is not a complete safetensors file ({error})", REMEDY) from None


def _described(file: Path, metadata: dict[str, str]) -> tuple[AdapterSettings, dict[str, str]]:
    """Settings and facts of the file's metadata."""
    for name in (PEFT_METADATA, OUR_METADATA):
        if name not in metadata:
            raise AdapterError(f"{file}: has no {name} in its metadata, so its alpha and kind are not known", REMEDY)
    try:
        ours = json.loads(metadata[OUR_METADATA])
        version, values, facts = ours["format_version"], ours["settings"], ours["facts"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{file}: its metadata cannot be read ({error!r})", REMEDY) from None
    if version != FORMAT_VERSION:
        raise AdapterError(f"{file}: has format {version}, this version reads {FORMAT_VERSION}", REMEDY)
    try:
        return TypeAdapter(AdapterSettings).validate_python(values), facts
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, ("adapter", *problem["loc"])))
        raise AdapterError(f"{file}: {where}: {problem['msg']}", "use the version of ccmdist that wrote it") from None


def _by_linear(file: Path, stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The stored tensors by linear and kind, block by block."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        for kind, suffix in PEFT_NAMES.items():
            if key.startswith(PREFIX) and key.endswith(f".{suffix}"):
                found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), {})[kind] = tensor
                break
        else:
            raise AdapterError(f"{file}: holds {key}, which is not the name of an adapter's tensor", REMEDY)
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _items(tensors: Tensors) -> Iterator[tuple[str, str, Tensor]]:
    for name, kinds in tensors.items():
        for kind, tensor in kinds.items():
            yield name, kind, tensor


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
