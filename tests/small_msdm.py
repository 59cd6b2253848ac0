"""A small MSDM that nobody trained: the folder of its first stage, and the network of its second."""

import torch

from ccmdist.config.objectives.msdm import MsdmSettings, MsdmVaeSettings
from ccmdist.models import msdm, msdm_unet
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.msdm import SCALING_FACTOR, make_vae
from ccmdist.models.network_state import NetworkState, write_network

VAE = MsdmVaeSettings(channels=(8, 16, 16), latent_channels=4, layers_per_block=1, crop_px=32)
SETTINGS = MsdmVaeSettings(channels=(16, 32, 32), layers_per_block=1, latent_channels=4, crop_px=32, max_text_tokens=48)
UNET = MsdmSettings(
    channels=(32, 32),
    layers_per_block=1,
    norm_groups=8,
    num_attention_levels=1,
    heads=4,
    cross_attention_dim=32,
    prediction="v_prediction",
)


def write_encoders(folder, size_px=64, text_encoder=None):
    """What a run of `msdm_vae` leaves in its folder `network`."""
    settings = VAE.model_copy(update={"text_encoder": text_encoder})
    state = NetworkState.of(settings, size_px, make_vae(settings, 1).state_dict(), {SCALING_FACTOR: "0.75"})
    write_network(folder, state)
    return folder


def network_state(encoders, size_px=64, settings=UNET, facts=None):
    """A network of `msdm` beside the folder ``encoders``."""
    folder = ModelFolder.open(encoders)
    ends = msdm_unet.Ends(VAE.latent_channels, folder.config("text_encoder")["hidden_size"])
    unet, source = msdm_unet.make_unet(settings, ends, 2), torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=source)
    known = {"base_digest": msdm_unet.encoders_digest(folder.encoder_identity()), "training_split": "train"}
    return NetworkState.of(settings, size_px, unet.state_dict(), known | (facts or {}), encoders)


def make_small_msdm(path, seed=0, scaling_factor=2.0, **changes):
    """The folder of a first stage with SETTINGS and ``changes`` of them, opened."""
    settings = SETTINGS.model_copy(update=changes)
    tensors = make_vae(settings, seed).state_dict()
    msdm.write_encoders(path, settings, {SCALING_FACTOR: repr(scaling_factor)}, tensors)
    return ModelFolder.open(path, "msdm")
