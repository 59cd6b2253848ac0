"""Whether what draws was trained on what it is to be shown; imports no torch."""

from collections.abc import Mapping

from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.errors import ConfigError


def refuse_another_structure(facts: Mapping[str, str], config: SynthesizeConfig) -> None:
    """Check that what stands for the nerves is what it was in training.

    Args:
        facts: Of what draws.
        config: Of the set.

    Raises:
        ConfigError: If it is not.
    """
    trained_on = facts.get("structure", "mask")
    if trained_on != config.data.structure:
        raise ConfigError(
            f"data.structure: {config.data.structure}, but {config.adapter or config.network} was trained on "
            f"{trained_on}",
            f"set data.structure={trained_on}, for precompute too, or name what was trained on {config.data.structure}",
        )
