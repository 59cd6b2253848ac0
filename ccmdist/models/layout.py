"""Which models are known, by the class of stock pipeline that their folder names: the one table. Imports no torch.

What a layout says of a model's parts is all that the rest of the project may ask about its kind; how the model is
called is said by its backbone, :mod:`ccmdist.models.backbones.choice`, under the same kind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ccmdist.config.objectives.objective import ModelKind
from ccmdist.models.template import KANDINSKY_AFTER, KANDINSKY_BEFORE, KANDINSKY_NUM_DROPPED_TOKENS, Version

WEIGHT_FILES: Final = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Components of Qwen-Image-Edit that have weights, and how diffusers and transformers name their files."""

MSDM_WEIGHT_FILES: Final = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The U-Net, `unet`, is there once stage two is trained; a cache is filled without it."""

REPOSITORIES: Final[dict[Version, str]] = {
    "v1": "Qwen/Qwen-Image-Edit",
    "2509": "Qwen/Qwen-Image-Edit-2509",
    "2511": "Qwen/Qwen-Image-Edit-2511",
}


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """What a folder of one kind of model holds, and what can be done with the model.

    Attributes:
        kind: The kind.
        name: What the model is called.
        weight_files: Components that a complete folder has the weights of, and the stem of their files.
        required: Small files; of each line one has to be there.
        tokenizers: Folders of tokenizers.
        encoders: Components that decide what is cached.
        call_version: Raised when our call of the encoders changes what it returns; part of every cache's fingerprint.
        words: What is said around a prompt, and how much of it is dropped again; part of it too.
        schedule: What noise levels depend on besides the scheduler's config, see `diffusion.flow.sampling_sigmas`.
        blocks: Lists of blocks of the transformer, in the order in which they run -> the key of its config that says
            how many there are.
        target_groups: Names for groups of linears in a block, as `adapter.targets` has them -> how those of each begin.
        published: Values of the transformer's config that only the published model has.
        repositories: Where it is published, the usual one first.
        folders: What a folder is called that a run leaves, where no other model is in one so called.
        versions: Where each of its versions is, for a model whose versions are called in different ways.
        licence: Under which it is published; "" for Apache-2.0.
        is_gated: Whether its licence has to be accepted before it can be downloaded.
        advice: How to come by a folder, where it cannot be downloaded.
        made_by: What `ccmdist model make` is given to make a small one.
        is_planned: Whether the planner knows what the transformer needs: memory, time, traffic.
        can_quantize: Whether the base may be held in 4 or 8 bits.
        can_compile: Whether its blocks can be compiled to draw with.
        has_comfyui_names: Whether the names that ComfyUI has for its linears are known, which are diffusers' own.
        output_tolerance: By how much of the largest output equal models may differ whose terms are added in another
            order: rounding, in fp32.
        can_complete: Whether its transformer may be shown a second condition image, one with a hole to fill.
    """

    kind: ModelKind
    name: str
    weight_files: Mapping[str, str]
    required: tuple[tuple[str, ...], ...]
    tokenizers: tuple[str, ...] = ("tokenizer",)
    encoders: tuple[str, ...] = ("vae", "text_encoder")
    call_version: int = 1
    words: Mapping[str, str | int] = field(default_factory=dict)
    schedule: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)
    target_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)
    repositories: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    versions: Mapping[Version, str] = field(default_factory=dict)
    licence: str = ""
    is_gated: bool = False
    advice: str = ""
    made_by: str = ""
    is_planned: bool = False
    can_quantize: bool = False
    can_compile: bool = False
    has_comfyui_names: bool = False
    output_tolerance: float = 1e-5
    can_complete: bool = False

    def selects(self, target: str, linear: str) -> bool:
        """Whether a target of an adapter means a linear.

        Args:
            target: Name of a group, or a suffix of names such as "attn.to_q".
            linear: Its name in its block.
        """
        if target in self.target_groups:
            return linear.startswith(self.target_groups[target])
        return f".{linear}".endswith(f".{target}")

    def published_as(self, path: Path, version: Version | None) -> str:
        """Where the model in a folder is published, by its version or the folder's name; "" if in one of several."""
        if version:
            return self.versions[version]
        if len(self.repositories) == 1:
            return self.repositories[0]
        return next((where for where in self.repositories if _name(where) == path.name), "")


QWEN: Final = FolderLayout(
    kind="qwen",
    name="Qwen-Image-Edit",
    weight_files=WEIGHT_FILES,
    required=(
        ("scheduler/scheduler_config.json",),
        ("processor/preprocessor_config.json", "processor/processor_config.json"),
        ("tokenizer/tokenizer_config.json",),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
    ),
    blocks={"transformer_blocks": "num_layers"},
    target_groups={"attn": ("attn.",), "mlp": ("img_mlp.", "txt_mlp.")},
    published={"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
    repositories=(REPOSITORIES["2509"], *REPOSITORIES.values()),
    versions=REPOSITORIES,
    made_by="--size tiny --fitted",
    is_planned=True,
    can_quantize=True,
    can_compile=True,
    has_comfyui_names=True,
    can_complete=True,
)
MSDM: Final = FolderLayout(
    kind="msdm",
    name="MSDM",
    weight_files=MSDM_WEIGHT_FILES,
    required=(
        ("scheduler/scheduler_config.json",),
        ("tokenizer/tokenizer_config.json",),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.txt", "tokenizer/vocab.json"),
    ),
    folders=("network",),
    advice="give the folder `network` of a finished run of `ccmdist train configs/train/wdlora.yaml "
    "configs/train/msdm_vae.yaml`",
)
FLUX: Final = FolderLayout(
    kind="flux",
    name="FLUX.1 Kontext",
    weight_files=WEIGHT_FILES | {"text_encoder_2": "model"},
    required=(
        ("scheduler/scheduler_config.json",),
        ("tokenizer/tokenizer_config.json",),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        ("tokenizer_2/tokenizer_config.json",),
        ("tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"),
    ),
    tokenizers=("tokenizer", "tokenizer_2"),
    encoders=("vae", "text_encoder", "text_encoder_2"),
    blocks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    target_groups={"attn": ("attn.",), "mlp": ("ff.", "ff_context.", "proj_mlp", "proj_out")},
    published={"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "joint_attention_dim": 4096},
    repositories=("black-forest-labs/FLUX.1-Kontext-dev",),
    licence="the FLUX.1 [dev] Non-Commercial License",
    is_gated=True,
    made_by="--kind flux",
)
FLUX_CONTROL: Final = replace(
    FLUX,
    kind="flux_control",
    name="FLUX.1 Control",
    repositories=("black-forest-labs/FLUX.1-Canny-dev", "black-forest-labs/FLUX.1-Depth-dev"),
    made_by="--kind flux_control",
)
KANDINSKY: Final = FolderLayout(
    kind="kandinsky5",
    name="Kandinsky 5 I2I",
    weight_files=WEIGHT_FILES | {"text_encoder_2": "model"},
    required=(
        ("scheduler/scheduler_config.json",),
        ("tokenizer/preprocessor_config.json", "tokenizer/processor_config.json"),
        ("tokenizer/tokenizer_config.json",),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        ("tokenizer_2/tokenizer_config.json",),
        ("tokenizer_2/tokenizer.json", "tokenizer_2/vocab.json"),
    ),
    tokenizers=("tokenizer", "tokenizer_2"),
    encoders=("vae", "text_encoder", "text_encoder_2"),
    words={
        "before": KANDINSKY_BEFORE,
        "after": KANDINSKY_AFTER,
        "num_dropped_tokens": KANDINSKY_NUM_DROPPED_TOKENS,
    },
    schedule={"_levels": "scheduler"},
    blocks={"text_transformer_blocks": "num_text_blocks", "visual_transformer_blocks": "num_visual_blocks"},
    target_groups={"attn": ("self_attention.", "cross_attention."), "mlp": ("feed_forward.",)},
    published={"num_visual_blocks": 50, "model_dim": 2560, "ff_dim": 10240},
    repositories=("kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers",),
    licence="the licence that its repository states",
    made_by="--kind kandinsky5",
    output_tolerance=2e-3,  # queries and keys are rounded to bf16 in every dtype: a last bit may turn one of them over
)

LAYOUTS: Final[dict[str, FolderLayout]] = {
    "QwenImageEditPipeline": QWEN,
    "QwenImageEditPlusPipeline": QWEN,
    "StableDiffusionPipeline": MSDM,
    "StableDiffusionInstructPix2PixPipeline": MSDM,
    "FluxKontextPipeline": FLUX,
    "FluxControlPipeline": FLUX_CONTROL,
    "Kandinsky5I2IPipeline": KANDINSKY,
}
"""`_class_name` of a folder's model_index.json -> what it holds."""

NAMES: Final[dict[ModelKind, str]] = {layout.kind: layout.name for layout in LAYOUTS.values()}


def kinds_named(kinds: Iterable[ModelKind]) -> str:
    """The names of some kinds, in words."""
    return ", ".join(NAMES[kind] for kind in kinds)


def layout_named(path: Path, kinds: Sequence[ModelKind] = ()) -> FolderLayout:
    """The layout of the model that a folder is named for which does not tell itself; of any other, the usual one.

    Args:
        path: The folder.
        kinds: Of models that will do, the usual one first; none if all do.
    """
    name, known = path.name.lower(), [one for one in LAYOUTS.values() if not kinds or one.kind in kinds]
    published = [one for one in known if name in (*one.folders, *(_name(where).lower() for where in one.repositories))]
    called = sorted((one for one in known if one.kind in name), key=lambda one: -len(one.kind))
    usual = [one for one in known if one.kind in kinds[:1]]
    return next(iter(published + called + usual), QWEN)


def advice_for(layout: FolderLayout, path: Path, version: Version | None = None) -> str:
    """How to come by a complete folder of a model.

    Args:
        layout: Of the model.
        path: Where it should be.
        version: Of the model, where it has versions.
    """
    if layout.advice:
        return layout.advice
    repository = layout.published_as(path, version) or layout.repositories[0]
    accept = (
        f"accept its licence at https://huggingface.co/{repository}, log in with `hf auth login`, and "
        if layout.is_gated
        else ""
    )
    return (
        f"on a machine with internet {accept}run `hf download {repository} --local-dir {path.name}` and copy "
        f"it to {path}, or make a small one: `ccmdist model make {layout.made_by} --out {path}`"
    )


def _name(repository: str) -> str:
    return repository.rpartition("/")[2]
