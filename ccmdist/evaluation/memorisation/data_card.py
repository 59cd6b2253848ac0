"""The card of a released set, for machines and for people: what it is, how it was made, what the gate found.

No path, no host, nobody of the training set and nothing of single images gets into it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from ccmdist import __version__
from ccmdist.ccm.groups import UNLABELLED
from ccmdist.data.audit import is_telling_nothing
from ccmdist.data.manifest import SPLITS, Manifest

CARD_VERSION: Final = 1
TO_BE_CHOSEN: Final = "to-be-chosen-by-whoever-publishes-this"
TITLE: Final = "Synthetic corneal confocal microscopy"
OF_PHANTOMS: Final = """
**Made from phantoms.** The frames that it was trained on or compared with are computer drawings, whose clinical groups
differ by construction. Nothing here says anything of patients.
"""
INTENDED_USE: Final = (
    "Research on methods: developing and testing segmentation, classification and image analysis of corneal confocal "
    "microscopy where real frames are scarce, always tested on real frames in the end.",
    "Teaching, and tests of software.",
)
NOT_FOR: Final = (
    "Diagnosis, treatment or any judgement on the health of a person.",
    "Statements on a disease: an image inherits its nerves from the mask it was drawn from, and its clinical group is "
    "the one that it was asked for, not one that anybody diagnosed.",
    "Passing images off as recordings of people.",
)
LIMITS: Final = (
    "The gate compares whole frames at 128 px after flips, turns of a few degrees and shifts of an eighth of the edge. "
    "It does not see copies of small parts of a frame, and it proves nothing on attacks that it does not make.",
    "Nerves are those of the masks. Where a mask is a person's, so is the nerve map that the image shows.",
    "`subject` is a pseudonym of whoever the mask is of, or of a phantom; it says which images belong together.",
)
SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

CARD: Final = """---
pretty_name: {title}
license: other
license_name: {licence}
task_categories:
- image-segmentation
- image-classification
size_categories:
- {size}
tags:
- synthetic
- medical
- corneal-confocal-microscopy
- webdataset
configs:
- config_name: default
  data_files:
{data_files}
---

# {title}

**No image here is a recording of a person.** All {num_images} were drawn by a model from nerve masks, and each says
so in itself (IPTC digital source type `trainedAlgorithmicMedia`).
{phantoms}
| clinical group asked for | images |
|---|---|
{groups}

Per sample: `image.png` (8-bit grey, {width_px} x {height_px} px), `mask.png` (its nerves, 0 or 255), `json` (prompt,
clinical_group, subject, eye, um_per_px, provenance). `manifest.json` names every tar with its SHA-256.

```python
from datasets import load_dataset

load_dataset("webdataset", data_files={{"{split}": "{split}-*.tar"}}, split="{split}")
```

## Origin

| | |
|---|---|
{origin}

## The gate

The set passed: no image was found to be a copy of a training frame, and no more images come nearer to one than held-out
frames do than chance explains.

| | |
|---|---|
{gate}
{concerns}
## Intended use

{intended_use}

## Not for

{not_for}

## Known limits

{limits}

## Licence

{licence_text}
"""


def card_of(manifest: Manifest, judged: Mapping[str, Any], shape: tuple[int, int], licence: str) -> dict[str, Any]:
    """All that the card says, as JSON types.

    Args:
        manifest: Of the set.
        judged: What report.json says of it, and whether it was compared with phantoms.
        shape: Height and width of an image.
        licence: As whoever publishes it names it; may be empty.
    """
    counts: Counter[str] = Counter()
    for entry in manifest.shards:
        counts.update(entry.group_counts)
    return {
        "card_version": CARD_VERSION,
        "ccmdist_version": __version__,
        "title": f"{TITLE}, from phantoms" if judged.get("of_phantoms") else TITLE,
        "of_phantoms": bool(judged.get("of_phantoms")),
        "licence": licence or TO_BE_CHOSEN,
        "set_digest": manifest.digest,
        "num_images": manifest.num_samples,
        "num_mask_subjects": len({subject for entry in manifest.shards for subject in entry.subjects}),
        "images_by_group": dict(sorted(counts.items())),
        "splits": [split for split in SPLITS if manifest.of_split(split)],
        "height_px": shape[0],
        "width_px": shape[1],
        "origins": [_told(origin) for origin in judged["origins"]],
        "made_by": public_about(manifest),
        "gate": _gate(judged["gate"]),
        "intended_use": list(INTENDED_USE),
        "not_for": list(NOT_FOR),
        "known_limits": list(LIMITS),
    }


def public_about(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says of how the set was made, without the people whom its generator was trained on."""
    about = _told(manifest.about)
    training = manifest.about.get("training")
    if isinstance(training, dict):
        subjects = training.get("subjects")
        about["training"] = _told(training) | {"num_subjects": None if subjects is None else len(subjects)}
    return about


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, digests and known words; what else there is stays behind."""
    return {name: value for name, value in values.items() if is_telling_nothing(value)}


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the set, without those of single images: these name training frames."""
    figures = gate["figures"]
    kept = ("synthetic", "held_out", "num_training_images", "num_training_subjects", "copy_limit", "share", "c_t")
    told = {name: figures[name] for name in (*kept, "membership", "duplicates")}
    about = ("passed", "concerns", "likeness", "nerves_blanked", "num_training_masks", "training_digest")
    return {name: gate[name] for name in about} | told | {"num_copies": len(figures["copies"])}


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown, with the header that hubs of data sets read."""
    gate, splits = card["gate"], card["splits"]
    concerns = "".join(f"\nOf concern: {concern}.\n" for concern in gate["concerns"])
    return CARD.format(
        title=card["title"],
        licence=card["licence"],
        size=next((name for limit, name in SIZES if card["num_images"] < limit), "n>1M"),
        data_files="\n".join(f"  - split: {split}\n    path: {split}-*.tar" for split in splits),
        num_images=card["num_images"],
        groups=_rows({group: num for group, num in card["images_by_group"].items() if group != UNLABELLED or num}),
        phantoms=OF_PHANTOMS if card["of_phantoms"] else "",
        width_px=card["width_px"],
        height_px=card["height_px"],
        split=splits[0],
        origin=_rows(_origin(card)),
        gate=_rows(_gate_rows(gate)),
        concerns=concerns,
        intended_use=_listed(card["intended_use"]),
        not_for=_listed(card["not_for"]),
        limits=_listed(card["known_limits"]),
        licence_text=LICENCE_OPEN if card["licence"] == TO_BE_CHOSEN else f"{card['licence']}.",
    )


ORIGIN: Final = {"base": "base held in"}
"""Fields of an origin whose names say too little by themselves."""
LICENCE_OPEN: Final = (
    "Not chosen yet. Which licence these images may carry depends on the frames that their generator was trained on "
    "and on the consent of the people they show: fill in `license_name` above, or do not publish the set."
)


def _origin(card: Mapping[str, Any]) -> dict[str, Any]:
    training = card["made_by"].get("training")
    people = training.get("num_subjects") if isinstance(training, dict) else training
    rows = {"set digest": card["set_digest"], "made by": f"ccmdist {card['ccmdist_version']}"}
    for number, origin in enumerate(card["origins"]):
        name = f" ({number + 1})" if len(card["origins"]) > 1 else ""
        rows |= {f"{ORIGIN.get(field, field)}{name}": value for field, value in origin.items()}
    return rows | {"subjects of training": people, "subjects of masks": card["num_mask_subjects"]}


def _gate_rows(gate: Mapping[str, Any]) -> dict[str, Any]:
    share, member, synthetic, held_out = (gate[name] for name in ("share", "membership", "synthetic", "held_out"))
    rows = {
        "compared with": f"{gate['num_training_images']} training frames of {gate['num_training_subjects']} subjects",
        "yardstick": f"{held_out['num_images']} held-out frames of {held_out['num_subjects']} subjects",
        "measure": gate["likeness"] + (", nerves blanked" if gate["nerves_blanked"] else ""),
        "highest NCC": f"{synthetic['highest_ncc']:.3f} (held-out {held_out['highest_ncc']:.3f})",
        "images beyond the copy limit": f"{gate['num_copies']} (NCC {gate['copy_limit']:.3f})",
        "nearer than held-out frames": f"{share['num_near_images']} (NCC {share['limit']:.3f}, p {share['p']:.2g})",
        "authentic images": f"{synthetic['authentic_share']:.0%} (held-out {held_out['authentic_share']:.0%})",
        "C_T": "left out" if gate["c_t"] is None else f"{gate['c_t']:.1f}",
        "duplicates": ", ".join(
            f"{rate['clinical_group']} {rate['num_duplicates']} of {rate['num_images']}" for rate in gate["duplicates"]
        ),
    }
    low, high = member["interval"] if member else (0.0, 0.0)
    told = f"AUC {member['auc']:.2f} ({low:.2f} to {high:.2f})" if member else "left out"
    return rows | {"membership of training subjects": told}


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {'-' if value is None else value} |" for name, value in values.items())


def _listed(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
