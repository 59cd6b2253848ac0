"""The gate catches every planted copy of a training frame, and lets independent sets pass.

python benchmarks/memorisation_gate.py [--sets 100] [--real-sets 10] [--images 72] [--copies 24] [--size-px 128]

Real sets are phantoms of 120 subjects, two frames of each, split by subject. Independent sets are phantoms of other
subjects, each set from a seed of its own, judged in full by the code of `ccmdist evaluate`; the anchor of their limit
is what the gate's level allows. Copies are of training frames in every disguise of `measure/planted.py`, each planted
among independent images; one is caught if it is listed, with the frame that it copies: that alone withholds a set.
The cost is measured apart, at the size and the number of frames of a study: 500 training frames of 384 px.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure.planted import (
    DISGUISES,
    copies,
    drawn,
    judged,
    real_set,
    stranger,
    training_frames,
    write_synthetic,
)
from measure.rows import Row, finish

from ccmdist.evaluation.memorisation.likeness import coarse_likeness, looked, nearest

STUDY_FRAMES, STUDY_PX = 500, 384
MS_PER_IMAGE = 20


def independent(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Of so many independent sets, how many are withheld."""
    withheld, near, highest = 0, 0, 0.0
    for number in range(arguments.sets):
        real = folder / f"real-{number % arguments.real_sets}"
        manifest = real_set(real, 40, arguments.size_px, number % arguments.real_sets)
        triples = [stranger(1000 + number, index, arguments.size_px) for index in range(arguments.images)]
        synthetic = folder / f"independent-{number}"
        write_synthetic(synthetic, (drawn(triple, f"{triple.key}-0000") for triple in triples), manifest)
        verdict = judged(real, synthetic, folder / f"report-{number % arguments.real_sets}")
        assert verdict.figures is not None, verdict.reasons
        withheld += not verdict.passed
        near += verdict.figures.share.num_near_images
        highest = max(highest, verdict.figures.synthetic.highest_ncc)
        if not verdict.passed:
            print(f"independent set {number}: {'; '.join(verdict.reasons)}", flush=True)
    num_images = arguments.sets * arguments.images
    yield Row(
        f"of {arguments.sets} independent sets of {arguments.images}, withheld", withheld, 0.1, arguments.sets / 100
    )
    yield Row("share of their images nearer than the threshold (anchor: expected)", near / num_images, 1 / 37)
    yield Row("highest NCC of an independent image", highest)


def planted(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Of the copies in each disguise, the share that is caught."""
    real = folder / "real-0"
    manifest = real_set(real, 40, arguments.size_px, 0)
    every = training_frames(real)
    frames = [every[index] for index in np.linspace(0, len(every) - 1, arguments.copies).round().astype(int)]
    others = [stranger(900, index, arguments.size_px) for index in range(arguments.images - arguments.copies)]
    called = 0
    for number, disguise in enumerate(DISGUISES):
        made = copies(frames, disguise, 800 + number, arguments.size_px)
        synthetic = folder / f"planted-{number}"
        alone = [drawn(triple, f"{triple.key}-0000") for triple in others]
        write_synthetic(synthetic, [*made.values(), *alone], manifest)
        verdict = judged(real, synthetic, folder / "report-0")
        assert verdict.figures is not None, verdict.reasons
        caught = {row.key: row.nearest_key for row in verdict.figures.copies}
        share = sum(caught.get(copy.key) == source for source, copy in made.items()) / len(made)
        yield Row(f"copies caught, {disguise}", share, None, 1.0, at_least=True)
        lowest = min(row.ncc for row in verdict.figures.copies)
        yield Row("  their lowest NCC (anchor: the limit)", lowest, verdict.figures.copy_limit)
        called += len(set(caught) - {copy.key for copy in made.values()})
    yield Row("independent images beside them that are called copies", called, None, 0)


def cost(arguments: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds of one core per image, against many training frames."""
    for num_frames, size_px, limit in ((200, 128, MS_PER_IMAGE), (STUDY_FRAMES, STUDY_PX, None)):
        # Few frames, many times: what is searched does not cost more for being different.
        images = [stranger(700, index, size_px).image for index in range(24)]
        start = time.process_time()
        seen = [looked(images[index % len(images)]) for index in range(num_frames)]
        coarse = np.stack([one.coarse for one in seen])
        for one in seen:
            _ = one.spectrum
        read_ms = 1e3 * (time.process_time() - start) / num_frames
        yield Row(f"ms per training frame of {size_px} px, once per process", read_ms)
        start = time.process_time()
        for image in images:
            one = looked(image)
            nearest(one, seen, *coarse_likeness(one, coarse))
        per_image = 1e3 * (time.process_time() - start) / len(images)
        yield Row(f"ms per image of {size_px} px against {num_frames} training frames", per_image, None, limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--real-sets", type=int, default=10)
    parser.add_argument("--images", type=int, default=72)
    parser.add_argument("--copies", type=int, default=24)
    parser.add_argument("--size-px", type=int, default=128)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*cost(arguments), *planted(arguments, Path(folder)), *independent(arguments, Path(folder))]
    return finish("memorisation_gate", rows)


if __name__ == "__main__":
    sys.exit(main())
