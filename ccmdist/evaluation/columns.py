"""Names of the columns in which measured images are compared."""

from typing import Final

FOUND, GIVEN = "found_", "given_"
"""Prefixes of biomarkers: of the nerves that the segmenter found in the image, and of the mask that came with it."""
CHAIN_CODE: Final = "cnfl_chain_code"
