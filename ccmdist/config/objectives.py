"""What can be learnt, and the settings of each: a tagged union whose tag, `kind`, is also the name of a baseline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.settings import Settings

ObjectiveKind = Literal["edit", "dual", "spade", "maisi", "msdm_vae", "msdm", "segment", "diagnose"]
AdapterName = Literal["synthesis", "completion"]
"""What an adapter of `dual` does: draw whole images, or fill holes in images."""
NetworkKind = Literal["spade", "maisi", "msdm_vae", "msdm", "segment", "diagnose"]
"""Objectives that train a network of their own from scratch, instead of an adapter on a frozen model."""

ModelKind = Literal["qwen", "msdm", "flux", "flux_control", "kandinsky5"]
"""Of model folders, and so of encoders and of what draws with them."""


UNET_FACTOR: Final = 16
"""Images over the deepest level of the U-Net that segments and diagnoses; image_size_px is always a multiple."""


class OfObjective(Settings):
    """What all of the project needs to know of an objective, told here alone."""

    trains: ClassVar[Literal["adapter", "network"]]
    """An adapter on a frozen model, or a network of its own."""
    sees: ClassVar[Literal["latents", "pixels"]]
    """Latents, with the cache and the model folder that they come from; or the pixels of the shards."""
    model_kinds: ClassVar[tuple[ModelKind, ...]] = ("qwen",)
    """Of model folders that will do, where latents are seen."""
    has_noise_levels: ClassVar[bool]
    """Whether images are drawn in denoise steps, with guidance; or in one pass."""
    adds_noise: ClassVar[bool] = False
    """Whether noise may be added anew at each denoise step."""
    draws: ClassVar[bool] = True
    """Whether what is trained draws images of masks and prompts."""
    serves: ClassVar[str] = ""
    """If it does not: what it is for."""

    made_by: ClassVar[Mapping[str, str]] = {}
    """Of the local files that settings name, those that a command here makes: setting -> how."""

    @property
    def num_adapters(self) -> int:
        """That are trained on a frozen model, in turn if there are several."""
        return 1

    @property
    def sees_mask(self) -> bool:
        """Whether the images that it draws follow their masks, and not their prompts alone."""
        return True

    @property
    def completion_share(self) -> float:
        """Of the optimizer steps, that of those which train to fill holes."""
        return 0.0

    @property
    def files(self) -> Mapping[str, Path]:
        """Setting -> the local file or folder that it names, read besides data and model."""
        return {}

    def refuse_size(self, image_size_px: int) -> None:
        """Refuse images that its networks cannot halve as often as they do.

        Raises:
            ValueError: For images of this edge.
        """


class EditSettings(OfObjective):
    """An adapter on a frozen model that edits images; its settings are `adapter`, `base` and the fields beside them."""

    trains = "adapter"
    sees = "latents"
    model_kinds = ("qwen", "flux", "flux_control", "kandinsky5")
    has_noise_levels = True
    kind: Literal["edit"] = "edit"


class DualSettings(OfObjective):
    """Two adapters on one frozen model (Dual-LoRA): one draws whole images, one fills holes in them.

    What a step trains is a function of the seed and its number. Fraction and weights are ours: the paper's were not
    found.
    """

    trains = "adapter"
    sees = "latents"
    model_kinds = EditSettings.model_kinds
    has_noise_levels = True
    kind: Literal["dual"] = "dual"
    adapters: tuple[AdapterName, ...] = ("synthesis", "completion")
    """Which are trained: both in turn, or one alone."""
    completion_fraction: float = Field(0.5, gt=0, lt=1)
    """Of the steps, where both are trained: that of the completion adapter."""
    min_snr_gamma: float | None = Field(5.0, gt=0)
    """Bound of the weights of noise levels, carried over to the flow; None for equal weights. Min-SNR's own default."""
    layout_weight: float = Field(1.0, ge=0)
    """How much more a token on the structure counts than one beside it: stands for the paper's layout regulariser."""

    @property
    def num_adapters(self) -> int:
        """See :class:`OfObjective`."""
        return len(self.adapters)

    @property
    def completion_share(self) -> float:
        """See :class:`OfObjective`."""
        return self.completion_fraction if self.num_adapters > 1 else float("completion" in self.adapters)

    @model_validator(mode="after")
    def _adapters_are_distinct(self) -> Self:
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            raise ValueError(
                f"objective.adapters: {list(self.adapters)} must name synthesis, completion or both, each once"
            )
        return self


class SpadeSettings(OfObjective):
    """A SPADE GAN from scratch: MONAI's generator and patch discriminators, on pixels. The sizes are ours."""

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    kind: Literal["spade"] = "spade"
    channels: tuple[int, ...] = Field((256, 256, 128, 64, 32), min_length=2, max_length=8)
    """Of the generator's blocks, each of which doubles the size of the image."""
    norm_channels: int = Field(64, ge=1)
    """Hidden channels of each spatially adaptive normalisation."""
    noise_dim: int = Field(128, ge=1)
    """Length of the noise from which an image is drawn: one mask has many images."""
    discriminator_channels: int = Field(32, ge=1)
    discriminator_layers: int = Field(2, ge=1)
    """Of the first; the next has twice as many, and MONAI doubles the channels with each layer."""
    num_discriminators: int = Field(2, ge=1, le=4)
    feature_matching: float = Field(10.0, ge=0)
    """Weight of the distance between real and drawn images in the discriminators' features."""

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        if image_size_px % (factor := 2 ** len(self.channels)) or image_size_px // factor < 2:
            raise ValueError(
                f"objective.channels: {len(self.channels)} blocks double the image {len(self.channels)} times, and "
                f"data.image_size_px {image_size_px} is not {factor} times 2 or more"
            )
        layers = self.discriminator_layers * self.num_discriminators
        if image_size_px < (smallest := 4 * 2**layers):
            raise ValueError(
                f"objective.discriminator_layers: the last discriminator has {layers} layers, which need images of "
                f"{smallest} px (data.image_size_px {image_size_px})"
            )


class MaisiSettings(OfObjective):
    """A MAISI-style latent diffusion from scratch: MONAI's U-Net, on the cached latents. Sizes as of MAISI's own."""

    trains = "network"
    sees = "latents"
    has_noise_levels = True
    kind: Literal["maisi"] = "maisi"
    channels: tuple[int, ...] = Field((64, 128, 256, 512), min_length=1, max_length=6)
    """Of the levels of the U-Net, each half as large as the one before."""
    num_res_blocks: int = Field(2, ge=1)
    norm_groups: int = Field(32, ge=1)
    """Channels are normed in so many groups, of two or more: noise level, clinical group and size of a pixel are added
    to channels as constants, which a norm over a single channel would take away again."""
    num_attention_levels: int = Field(2, ge=0)
    """The deepest levels attend."""
    head_channels: int = Field(32, ge=1)
    null_fraction: float = Field(0.1, ge=0, lt=1)
    """Of training samples whose clinical group is withheld, so that there is something to guide away from. Ours."""

    @model_validator(mode="after")
    def _channels_fit_norms_and_heads(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups or count == self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not make {self.norm_groups} groups of two or more")
        attending = self.channels[-max(self.num_attention_levels, 1) :]  # the middle block always attends
        if bad := [count for count in attending if count % self.head_channels]:
            raise ValueError(f"head_channels: {bad[0]} channels do not divide into heads of {self.head_channels}")
        return self

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        num_halvings, latent_px = len(self.channels) - 1, 2 * (image_size_px // PX_PER_TOKEN)
        if latent_px % (factor := 2**num_halvings):
            raise ValueError(
                f"objective.channels: {len(self.channels)} levels halve latents of {latent_px} {num_halvings} times, "
                f"which {factor} does not divide; use fewer levels, or another data.image_size_px"
            )


class MsdmVaeSettings(OfObjective):
    """The VAE of MSDM from scratch: diffusers' AutoencoderKL on the pixels of frames and masks.

    Loss, latent channels and the real configuration's sizes as in the released code; crops of masks and L1 are ours.
    """

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    draws = False
    serves = "give it as data.model to `ccmdist precompute`, train objective.kind msdm on it, and draw with that"
    kind: Literal["msdm_vae"] = "msdm_vae"
    channels: tuple[int, ...] = Field((64, 128, 256, 512), min_length=1, max_length=6)
    """Of the levels, each half as large as the one before: latents have 1 / 2^(levels - 1) of the image's edge."""
    latent_channels: int = Field(8, ge=1, le=64)
    layers_per_block: int = Field(2, ge=1)
    norm_groups: int = Field(8, ge=1)
    crop_px: int = Field(256, ge=16)
    """Edge of the squares that are cut from images; where they lie is drawn for each sample."""
    mask_share: float = Field(0.2, ge=0, lt=1)
    """Of the crops, those that show the nerve mask, whose latents are what the diffusion model is conditioned on."""
    mse: float = Field(1.0, ge=0)
    l1: float = Field(0.0, ge=0)
    """Weight of the mean absolute difference."""
    ssim: float = Field(1.0, ge=0)
    """Weight of 1 - SSIM."""
    kl: float = Field(1e-6, ge=0)
    """Weight of the divergence from a normal distribution, summed over a sample's latents."""
    perceptual: float = Field(1.0, ge=0)
    """Weight of LPIPS; without `perceptual_weights` there is none, and the log says so."""
    perceptual_weights: Path | None = None
    """A local file with the convolutions of VGG16, as torchvision names them; checkpoints hold to its content."""
    text_encoder: Path | None = None
    """A local folder of a transformers BERT or CLIP text model, with its tokenizer, which becomes part of the model
    folder that the run leaves. None: a tiny one with random weights, for trials. Checkpoints hold to its content."""
    max_text_tokens: int = Field(64, ge=8)
    """Length to which all prompts are padded, and which none may exceed; less where the encoder takes less."""

    @model_validator(mode="after")
    def _channels_fit_norms(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not divide into {self.norm_groups} groups")
        if not self.mse and not self.l1:
            raise ValueError("mse, l1: one of them must be above 0, or brightness is not learnt")
        return self

    @property
    def files(self) -> Mapping[str, Path]:
        """See :class:`OfObjective`."""
        named = {"text_encoder": self.text_encoder, "perceptual_weights": self.perceptual_weights}
        return {name: path for name, path in named.items() if path is not None}

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        factor = 2 ** (len(self.channels) - 1)
        for name, edge_px in (("data.image_size_px", image_size_px), ("objective.crop_px", self.crop_px)):
            if edge_px % factor:
                lower = edge_px // factor * factor
                raise ValueError(
                    f"objective.channels: {len(self.channels)} levels need an edge that {factor} divides; {name} is "
                    f"{edge_px}, the nearest are {lower} and {lower + factor}"
                )
        if self.crop_px > image_size_px:
            raise ValueError(f"objective.crop_px: {self.crop_px} is larger than data.image_size_px {image_size_px}")


NUM_NOISE_LEVELS: Final = 1000
"""Of MSDM."""


class MsdmSettings(OfObjective):
    """MSDM from scratch: diffusers' UNet2DConditionModel with cross-attention to a clinical text encoder's states.

    It sees the latents of a model folder that a run of `msdm_vae` has left. Sizes, noise and null fraction as in the
    released code; the mask as a condition is ours.
    """

    trains = "network"
    sees = "latents"
    model_kinds = ("msdm",)
    has_noise_levels = True
    adds_noise = True
    kind: Literal["msdm"] = "msdm"
    channels: tuple[int, ...] = Field((256, 256, 512, 1024), min_length=2, max_length=6)
    """Of the levels, each half as large as the one before."""
    layers_per_block: int = Field(2, ge=1)
    norm_groups: int = Field(32, ge=1)
    num_attention_levels: int = Field(4, ge=0)
    """The deepest levels attend to the text; the middle block always does."""
    heads: int = Field(8, ge=1)
    """Of attention, in every level."""
    cross_attention_dim: int = Field(1024, ge=1)
    """Width to which the text encoder's states are projected."""
    dropout: float = Field(0.1, ge=0, lt=1)
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """Of noise, as in the released code, or of velocity, which learns nerves in far fewer steps (ours)."""
    loss: Literal["l1", "l2"] = "l1"
    beta_start: float = Field(0.002, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    """Of 1000 noise levels; the square roots of beta are evenly spaced between both (scaled_linear)."""
    null_fraction: float = Field(0.2, ge=0, lt=1)
    """Of training samples whose prompt is dropped, so that there is something to guide away from."""
    mask_condition: bool = True
    """Give latents of the nerve mask beside the noisy ones; if not, the prompt is all that images follow."""

    @property
    def sees_mask(self) -> bool:
        """See :attr:`OfObjective.sees_mask`."""
        return self.mask_condition

    @model_validator(mode="after")
    def _channels_fit_norms_and_heads(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not divide into {self.norm_groups} groups")
        attending = self.channels[-max(self.num_attention_levels, 1) :]  # the middle block always attends
        if bad := [count for count in attending if count % self.heads]:
            raise ValueError(f"heads: {bad[0]} channels do not divide into {self.heads} heads")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start:g} must not be above beta_end {self.beta_end:g}")
        return self


class UnetSettings(OfObjective):
    """What objectives with a U-Net on pixels have in common: MONAI's BasicUNet, whose four levels others read."""

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    draws = False
    channels: tuple[int, int, int, int, int, int] = (32, 32, 64, 128, 256, 32)
    """Of the image's own level, the four below, each half as large as the one before, and the last convolution."""


class SegmentSettings(UnetSettings):
    """Nerve masks of frames by a U-Net from scratch: what MDF-MLLM's U-Net is before it learns to diagnose."""

    serves = "give it as objective.unet to objective.kind diagnose, and draw with another network"
    kind: Literal["segment"] = "segment"


class DiagnoseSettings(UnetSettings):
    """The clinical group of a frame by MDF-MLLM: levels of a U-Net read by layers of a multimodal language model.

    After arXiv:2509.21358, of which no code was found: depths, tokens, heads, FiLM's place and all sizes are ours.
    """

    serves = "it tells groups of frames; draw with another network"
    made_by: ClassVar[Mapping[str, str]] = {"unet": "train objective.kind segment first (configs/train/segment.yaml)"}
    kind: Literal["diagnose"] = "diagnose"
    mllm: Path
    """A local folder of Mllama (LLaMA 3.2 Vision) or Qwen2.5-VL in transformers' layout, with its tokenizer."""
    unet: Path | None = None
    """What a run of `segment` has left, RUN/network; None: the U-Net begins with random weights."""
    llm: Literal["wdlora", "lora", "full", "frozen"] = "wdlora"
    """How the language model is trained: by an adapter on its decoder's linears, as a whole, or not at all."""
    llm_dtype: Literal["bf16", "fp32"] = "bf16"
    """How its weights are held; those that are trained are always fp32."""
    lora_rank: int = Field(16, ge=1, le=1024)
    """Of the adapter; its scale is 1."""
    train_unet: bool = True
    fusion_levels: tuple[int, ...] = (1, 2, 3, 4)
    """Of the U-Net, from fine to coarse, that the language model reads. None: it is bare, without U-Net and FiLM."""
    token_grid: int = Field(12, ge=1)
    """Each level is read as so many by so many tokens."""
    fusion_heads: int = Field(8, ge=1)
    """Of the attention to a level's tokens."""
    film: bool = True
    """Let the language model's state scale and shift the levels that it reads, before decoder and head see them."""
    mask_weight: float = Field(0.5, ge=0)
    """Of the loss of the nerve mask that the U-Net finds, beside that of the group; 0 for none."""

    @property
    def files(self) -> Mapping[str, Path]:
        """See :class:`OfObjective`."""
        return {"mllm": self.mllm} | ({} if self.unet is None else {"unet": self.unet})

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        if (edge := image_size_px // UNET_FACTOR) % self.token_grid:
            where = f"the {edge} px of level 4, with data.image_size_px {image_size_px}"
            raise ValueError(f"objective.token_grid: {self.token_grid} does not divide {where}")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        levels = self.fusion_levels
        if len(set(levels)) < len(levels) or not set(levels) <= {1, 2, 3, 4}:
            raise ValueError(f"fusion_levels: {list(levels)} must name levels 1 to 4, each at most once")
        if self.unet is not None and not levels:
            raise ValueError(f"unet: {self.unet} is of no use without fusion_levels; set it to null")
        if self.unet is None and levels and not self.train_unet:
            raise ValueError("train_unet: false, but the U-Net begins with random weights; name its folder as unet")
        if self.llm == "full" and self.llm_dtype != "fp32":
            raise ValueError(f"llm_dtype: {self.llm_dtype} is too coarse for weights that are trained; set fp32")
        return self


def objective_kind(values: Any) -> str:
    """The tag of settings that are not validated yet; `edit` where none is given."""
    kind = values.get("kind", "edit") if isinstance(values, dict) else getattr(values, "kind", "edit")
    return str(kind)


ObjectiveSettings = Annotated[
    Annotated[EditSettings, Tag("edit")]
    | Annotated[DualSettings, Tag("dual")]
    | Annotated[SpadeSettings, Tag("spade")]
    | Annotated[MaisiSettings, Tag("maisi")]
    | Annotated[MsdmVaeSettings, Tag("msdm_vae")]
    | Annotated[MsdmSettings, Tag("msdm")]
    | Annotated[SegmentSettings, Tag("segment")]
    | Annotated[DiagnoseSettings, Tag("diagnose")],
    Discriminator(objective_kind),
]
