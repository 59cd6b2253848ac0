"""The README.md of an exported adapter: what it is, what it was made from, how it is loaded, what it is not for."""

from collections.abc import Collection, Mapping
from typing import Final

from ccmdist.config.train import QUANTIZED, AdapterSettings, system_of

GROWN: Final = "the ranks of A and B grown layer by layer while the Fisher information said that one more would help"
FORMULAS: Final = {
    "wdlora": "WDLoRA (DoRA with a constant norm in the backward pass): `W' = m (W + s B A) / ||W + s B A||`",
    "lora": "LoRA: `W' = W + s B A`",
    "se-wdlora": f"Se-WDLoRA: `W' = m (W + s B A) / ||W + s B A||`, norm constant in the backward pass, {GROWN}",
    "selora": f"SeLoRA: `W' = W + s B A`, {GROWN}",
}

CARD: Final = """---
{base_model}library_name: diffusers
pipeline_tag: image-to-image
license: other
license_name: to-be-chosen-by-whoever-publishes-this
tags:
- lora
- {kind}
- corneal-confocal-microscopy
---

# Adapter for {base_name}: corneal confocal microscopy images from nerve masks

**Not for diagnosis.** It draws synthetic images for research. They must not be used to judge the health of any
person, and must not be passed off as recordings of one.

{formula}

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{load_from}", torch_dtype=torch.bfloat16)
pipe.load_lora_weights("THIS_FOLDER", weight_name="{weights_file}")
```

The base has to be the one named below. What to know of stock loaders and pipelines:

- On a bfloat16 base the loader rounds magnitudes and norms to bfloat16 too, some tenths of a per cent off.
  `ccmdist adapter merge` computes them in float32 and rounds once.
- {enlarges}. `ccmdist synthesize` conditions as in training.
{notes}- Where there is a `comfyui.safetensors`, it is the same adapter for ComfyUI's LoRA loader, at strength 1.

| | |
|---|---|
| base | {base} |
| kind | {kind} |
| lora_rank r, scale s = alpha / r | {lora_rank}, {scale:g} |
| adapted linears, trained numbers | {num_linears:,}, {num_parameters:,} |
| targets | {targets} |
{facts}

## Licence

The base model is published under {licence}. Which licence this adapter may carry depends on the images it
was trained on and on the consent of the people they show: fill in `license` above, or do not publish it.
"""


ENLARGES: Final = "The pipeline enlarges the mask to about one megapixel"
OF_QWEN: Final = """, and under transformers 5 encodes it without its positions in
  the image (diffusers issue 14194)"""
TRAINED_ON: Final = """- It was trained on the base in {base}. On the base as published each row keeps its trained norm;
  its direction is off by what the {base} weights are off. `ccmdist adapter merge` too merges into the published base.
"""


COMPLETION: Final = """- It fills holes, seeing two images: the structure and the image with its hole in grey, in this
  order. `ccmdist synthesize objective=completion` gives it both, and keeps what lies outside of the hole.
"""


def model_card(
    settings: AdapterSettings,
    lora_ranks: Mapping[str, int],
    num_parameters: int,
    facts: Mapping[str, str],
    weights_file: str,
) -> str:
    """The card as Markdown with the header that model hubs read.

    Args:
        settings: Of the adapter.
        lora_ranks: Name of adapted linear -> its r.
        num_parameters: Trained numbers.
        facts: Of the adapter's origin; "base_model" is the repository of a published base, "pipeline" the class
            that loads it.
        weights_file: Name of the file to load.
    """
    repository, held = facts.get("base_model", ""), facts.get("base_in_training")
    notes = COMPLETION if facts.get("adapter_name") == "completion" else ""
    notes += TRAINED_ON.format(base=held) if held in QUANTIZED else ""
    is_qwen = "base_name" not in facts
    return CARD.format(
        base_name=facts.get("base_name", "Qwen-Image-Edit"),
        licence=facts.get("base_licence", "Apache-2.0"),
        enlarges=ENLARGES + OF_QWEN if is_qwen else ENLARGES,
        base_model=f"base_model: {repository}\n" if repository else "",
        load_from=repository or "FOLDER_OF_THE_BASE",
        base=repository or "not a published model, see base_digest",
        pipeline=facts.get("pipeline", "QwenImageEditPlusPipeline"),
        kind=(system := system_of(settings)),
        formula=FORMULAS[system],
        weights_file=weights_file,
        notes=notes,
        lora_rank=told_ranks(lora_ranks.values()),
        scale=settings.scale,
        num_linears=len(lora_ranks),
        num_parameters=num_parameters,
        targets=", ".join(f"`{target}`" for target in settings.targets),
        facts="\n".join(f"| {name} | {value} |" for name, value in sorted(facts.items()) if name != "movement"),
    )


def told_ranks(lora_ranks: Collection[int]) -> str:
    """Ranks in words: "16" or, where layers differ, "1 to 16 (226 in all)"."""
    least, most = min(lora_ranks), max(lora_ranks)
    return str(most) if least == most else f"{least} to {most} ({sum(lora_ranks)} in all)"
