"""The images that a plan asks for, in batches of one text length that one adapter draws; imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.config.objectives.objective import AdapterName
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.triple import MAX_KEY_LENGTH
from ccmdist.errors import ConfigError

MAX_BATCHES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One image that is to be drawn."""

    key: str
    """Of the synthetic sample: the source's key and the image number."""
    source_key: str
    """Sample of the source set, or flipped view of one, whose mask and prompt are used."""
    image_number: int
    """Counts the images of one mask; with the plan's seed and the source's key it decides the noise."""
    subject: str
    clinical_group: ClinicalGroup | None
    hole: int | None = None
    """Which of the holes of its source is filled; None: a whole image is drawn."""

    @property
    def objective(self) -> AdapterName:
        """What it takes to draw it."""
        return "synthesis" if self.hole is None else "completion"

    def values(self) -> dict[str, Any]:
        """As JSON types; a request for a whole image is written as before there were holes."""
        return {name: value for name, value in asdict(self).items() if name != "hole" or value is not None}


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are sampled together: of one text length, by one adapter."""

    num_text_tokens: int
    requests: tuple[Request, ...]

    @property
    def objective(self) -> AdapterName:
        """Of all its requests."""
        return self.requests[0].objective

    def values(self) -> dict[str, Any]:
        """As JSON types."""
        return {"num_text_tokens": self.num_text_tokens, "requests": [request.values() for request in self.requests]}


def batches_of(config: SynthesizeConfig, entries: Sequence[CacheEntry]) -> tuple[Batch, ...]:
    """All whole images that are asked for, then all filled holes: whoever draws both changes the adapter once.

    Args:
        config: How many images of each mask, in batches of which size.
        entries: Samples that are drawn from.

    Raises:
        ConfigError: If a key would become too long, or there are too many batches.
    """
    by_length = sorted(entries, key=lambda entry: entry.num_text_tokens)
    batches = []
    for objective in config.objectives:
        for num_text_tokens, alike in groupby(by_length, key=lambda entry: entry.num_text_tokens):
            requests = list(_requests(config, alike, objective))
            for first in range(0, len(requests), config.batch_size):
                batches.append(Batch(num_text_tokens, tuple(requests[first : first + config.batch_size])))
    if len(batches) > MAX_BATCHES:
        raise ConfigError(f"batch_size: makes {len(batches)} batches, expected at most {MAX_BATCHES}", "raise it")
    return tuple(batches)


def _requests(config: SynthesizeConfig, entries: Iterator[CacheEntry], objective: AdapterName) -> Iterator[Request]:
    for entry in entries:
        for number in range(config.images_per_mask):
            hole = None
            if objective == "completion":
                assert config.data.holes is not None, "settings that fill holes say how they are cut"
                hole = number % config.data.holes.per_sample
            # A fixed width, and a letter before the number of a filled hole: no two requests can have one key.
            key = f"{entry.key}-{number:04d}" if hole is None else f"{entry.key}-c{number:04d}"
            if len(key) > MAX_KEY_LENGTH:
                raise ConfigError(
                    f"data.shards: key {entry.key} is too long, {key} has more than {MAX_KEY_LENGTH} characters",
                    "pack the shards with shorter keys",
                )
            yield Request(key, entry.key, number, entry.subject, entry.clinical_group, hole)
