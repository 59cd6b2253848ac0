"""The samples of a set, split by subject anew: one fold of a cross-validation, to train a generator on.

A generator that is trained on the train split of a fold never saw a subject that the fold tests.
"""

from collections import Counter
from collections.abc import Iterator

from ccmdist.config.data import FoldShardsConfig, Split
from ccmdist.console import tracked
from ccmdist.data.manifest import SPLITS, Manifest, read_manifest
from ccmdist.data.reader import read_metas, read_shard
from ccmdist.data.splits import Subject, fold_splits
from ccmdist.data.triple import Triple
from ccmdist.data.writer import existing_set, write_set
from ccmdist.errors import ShardError


def write_fold_set(config: FoldShardsConfig) -> Manifest:
    """Make the set of one fold, or find it made already. The same source and settings give the same bytes.

    Samples keep their keys, pseudonyms and bytes. Frames that are to be repaired, which bring an inpaint mask, are in
    the set of the fold that tests their subject alone.

    Raises:
        ShardError: If the source is synthetic, a shard of it is damaged, or the folder holds another set.
    """
    manifest = _source(config)
    settings = {name: getattr(config, name) for name in ("fold", "num_folds", "samples_per_shard", "seed")}
    about = {"made_by": "ccmdist shards fold", "settings": settings, "source_set_digest": manifest.digest}
    if (found := existing_set(config.out, about)) is not None:
        return found
    splits = _splits(config, manifest)
    triples = tracked(_triples(config, manifest), "samples", manifest.num_samples)
    placed = ((splits[triple.meta.subject], triple) for triple in triples)
    # What an inpaint mask of its own hides in a frame is not known: nothing may be learnt from it.
    samples = ((split, triple) for split, triple in placed if split == "test" or triple.inpaint_mask is None)
    return write_set(config.out, manifest.kind, samples, config.samples_per_shard, about)


def describe_fold_set(config: FoldShardsConfig) -> str:
    """What the set would hold.

    Raises:
        ShardError: If there is no source, or it is synthetic.
    """
    counts = Counter(_splits(config, _source(config)).values())
    told = ", ".join(f"{split} {counts[split]} subjects" for split in SPLITS)
    return f"{config.out}: fold {config.fold} of {config.num_folds} of {config.source}; {told}"


def _source(config: FoldShardsConfig) -> Manifest:
    manifest = read_manifest(config.source)
    if manifest.kind == "synthetic":
        raise ShardError(
            f"{config.source}: is a synthetic set, expected real frames or phantoms",
            "make folds of the real set, and train a generator on each",
        )
    return manifest


def _splits(config: FoldShardsConfig, manifest: Manifest) -> dict[str, Split]:
    metas = [meta for entry in manifest.shards for _, meta in read_metas(config.source, entry)]
    groups, counts = {meta.subject: meta.clinical_group for meta in metas}, Counter(meta.subject for meta in metas)
    subjects = {name: Subject(group, counts[name]) for name, group in groups.items()}
    if len(subjects) < config.num_folds:
        raise ShardError(
            f"{config.source}: has {len(subjects)} subjects, fewer than the {config.num_folds} folds", "lower num_folds"
        )
    return fold_splits(subjects, config.fold, config.num_folds, config.seed)


def _triples(config: FoldShardsConfig, manifest: Manifest) -> Iterator[Triple]:
    for entry in manifest.shards:
        yield from read_shard(config.source, entry)
