"""A small MSDM's encoders, written as a run of `msdm_vae` leaves them."""

from ccmdist.config.objectives import MsdmVaeSettings
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.msdm import SCALING_FACTOR, make_vae, write_encoders

SETTINGS = MsdmVaeSettings(channels=(16, 32, 32), layers_per_block=1, latent_channels=4, crop_px=32, max_text_tokens=48)


def make_small_msdm(path, seed=0, scaling_factor=2.0, **changes):
    """The folder, opened."""
    settings = SETTINGS.model_copy(update=changes)
    tensors = make_vae(settings, seed).state_dict()
    write_encoders(path, settings, {SCALING_FACTOR: repr(scaling_factor)}, tensors)
    return ModelFolder.open(path, "msdm")
