"""A cache with structures and holes holds what the encoders give one by one, and is a folder of its own."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from ccmdist.ccm.prompts import NEGATIVE_PROMPT
from ccmdist.ccm.structure import points_of_mask, structure_picture
from ccmdist.config.data import DataSettings, HoleSettings, PrecomputeConfig
from ccmdist.config.loading import load
from ccmdist.data.cache_index import command
from ccmdist.data.holes import holed_image, holes_of, layout_of, unpacked
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.phantom_shards import sample
from ccmdist.data.stream import collated
from ccmdist.data.views import views
from ccmdist.data.writer import write_set
from ccmdist.errors import CacheError, ShardError
from ccmdist.jobs.precompute import describe
from ccmdist.models.encoders import LatentCodec, PromptEncoder
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.precompute.fill import fill_cache

SIZE_PX, EDGE_PX = 64, 96
HOLES = HoleSettings(per_sample=3, seed=5)


def samples():
    """Two of train, one with points; two of val, one with a hole of its own."""
    first, second, third, fourth = (sample(0, "Control", number, 0, EDGE_PX) for number in range(4))
    points, hole = np.zeros((EDGE_PX, EDGE_PX), np.uint8), np.zeros((EDGE_PX, EDGE_PX), bool)
    points[[20, 70, 80], [20, 30, 90]], hole[30:50, 10:90] = (1, 2, 3), True
    return [
        ("train", first),
        ("train", replace(second, points=points)),
        ("val", replace(third, inpaint_mask=hole)),
        ("val", fourth),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holes")
    write_set(folder / "shards", "phantom", samples(), 4)
    make_model("tiny", "2509", folder / "model")
    return folder


def config(world, cache, batch_size=2, **changes):
    values = {"structure": "mask_and_points", "holes": HOLES, "dtype": "fp32", "flips": ("hflip",)} | changes
    data = DataSettings(shards=world / "shards", model=world / "model", cache=cache, image_size_px=SIZE_PX, **values)
    return PrecomputeConfig(data=data, splits=("train", "val"), batch_size=batch_size)


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    settings = config(world, tmp_path_factory.mktemp("cache"))
    return settings, fill_cache(settings, 0, 1)


def opened(settings):
    identity = ModelFolder.open(settings.data.model).encoder_identity()
    return LatentCache.open(settings.data, identity, ("train", "val"))


def seen():
    """The views as the run sees them: points of a sample without any come from its mask, once for all views."""
    found = {}
    for split, triple in samples():
        points = points_of_mask(triple.nerve_mask) if triple.points is None else triple.points
        flips = ("hflip",) if split == "train" else ()
        found |= {view.key: view for view in views(replace(triple, points=points), SIZE_PX, flips, "")}
    return found


def test_the_cache_holds_what_the_encoders_give_one_by_one(filled):
    settings, _ = filled
    model, cache = ModelFolder.open(settings.data.model), opened(settings)
    prompts = PromptEncoder.load(model, torch.float32, "cpu")
    codec = LatentCodec.load(model, torch.float32, "cpu")
    entries = [*cache.entries("train"), *cache.entries("val")]
    assert [entry.key for entry in entries] == list(seen())
    for entry in entries:
        view, found = seen()[entry.key], cache.read(entry)
        picture = structure_picture(view.nerve_mask, view.points, "mask_and_points")
        holes = holes_of(view, HOLES, SIZE_PX)
        images = holed_image(view.image, holes)
        # Batched and single matrix products differ in the last bits of fp32.
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found["prompt_embeds"], prompts.encode([view.meta.prompt], [picture])[0], **close)
        torch.testing.assert_close(cache.read_negative(entry), prompts.encode([NEGATIVE_PROMPT], [picture])[0], **close)
        torch.testing.assert_close(found["image_latents"], codec.encode(np.stack([view.image]))[0], **close)
        torch.testing.assert_close(found["mask_latents"], codec.encode(picture[None])[0], **close)
        one_by_one = torch.cat([codec.encode(image[None]) for image in images])
        torch.testing.assert_close(found["holed_latents"], one_by_one, **close)
        np.testing.assert_array_equal(unpacked(found["holes"], SIZE_PX).numpy(), holes)
        np.testing.assert_array_equal(found["layout"].numpy(), layout_of(picture))
        assert len(found) == 6
    cache.verify()


def test_shapes_and_types_are_those_of_the_contract_and_samples_stack(filled):
    cache = opened(filled[0])
    batch = collated(cache, cache.entries("train")[:2])
    assert batch["holed_latents"].shape == (2, 3, 16, 8, 8)
    assert batch["holed_latents"].dtype == torch.float32
    assert (batch["holes"].shape, batch["holes"].dtype) == ((2, 3, 64, 8), torch.uint8)
    assert (batch["layout"].shape, batch["layout"].dtype) == ((2, 4, 4), torch.uint8)


def test_a_hole_of_its_own_is_every_hole_of_a_sample_and_is_scaled_with_it(filled):
    cache = opened(filled[0])
    own, other = (unpacked(cache.read(entry)["holes"], SIZE_PX) for entry in cache.entries("val"))
    expected = torch.zeros(SIZE_PX, SIZE_PX, dtype=torch.bool)
    expected[20:34, 6:60] = True  # 30..50 and 10..90 of 96, every pixel with a part in it
    assert torch.equal(own, expected.expand(3, -1, -1))
    assert not torch.equal(other[0], other[1])


def test_points_of_a_flipped_view_are_the_flipped_points(world, filled):
    model = ModelFolder.open(world / "model")
    codec, cache = LatentCodec.load(model, torch.float32, "cpu"), opened(filled[0])
    plain, mirrored = cache.entries("train")[:2]
    assert mirrored.key == f"{plain.key}-hflip"
    view = seen()[plain.key]
    picture = structure_picture(view.nerve_mask, view.points, "mask_and_points")
    expected = codec.encode(picture[None, :, ::-1])[0]
    torch.testing.assert_close(cache.read(mirrored)["mask_latents"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.read(mirrored)["layout"], cache.read(plain)["layout"].flip(-1))


def test_the_number_of_samples_at_once_and_of_workers_changes_no_hole(world, filled, tmp_path):
    settings = config(world, tmp_path, batch_size=1)
    for worker in (1, 0):
        assert fill_cache(settings, worker, 2).name == filled[1].name
    for ours, theirs in zip(opened(settings).entries("train"), opened(filled[0]).entries("train"), strict=True):
        first, second = opened(settings).read(ours), opened(filled[0]).read(theirs)
        assert torch.equal(first["holes"], second["holes"])
        torch.testing.assert_close(first["holed_latents"], second["holed_latents"], rtol=1e-4, atol=1e-5)


def test_structure_and_holes_are_caches_of_their_own_and_a_nearest_one_says_what_differs(world, filled, tmp_path):
    cache = filled[0].data.cache
    for changes, told in (
        ({"structure": "points"}, "structure (mask_and_points, expected points)"),
        ({"structure": "mask"}, "structure (mask_and_points, expected mask)"),
        ({"holes": HoleSettings(per_sample=3, seed=6)}, "holes.seed (5, expected 6)"),
        ({"holes": HoleSettings(per_sample=2, seed=5)}, "holes.per_sample (3, expected 2)"),
    ):
        with pytest.raises(CacheError) as error:
            opened(config(world, cache, **changes))
        assert f"differs in {told}; run `ccmdist precompute" in str(error.value)
    with pytest.raises(CacheError, match=r"differs in holes.per_sample"):
        opened(config(world, cache, holes=None))


def test_the_command_that_fills_it_names_structure_and_holes_and_is_understood(world, tmp_path):
    data = config(world, tmp_path).data
    line = command(data)
    assert "data.structure=mask_and_points" in line
    assert "data.holes.per_sample=3 data.holes.seed=5" in line
    words = shlex.split(line)[2:]
    assert load(PrecomputeConfig, [], words).data == data


def test_a_usual_cache_has_no_tensors_of_holes(world, tmp_path):
    settings = config(world, tmp_path, structure="mask", holes=None, flips=())
    fill_cache(settings, 0, 1)
    cache = opened(settings)
    assert cache.read(cache.entries("val")[0]).keys() == {"prompt_embeds", "image_latents", "mask_latents"}


def test_a_sample_of_train_with_a_hole_of_its_own_is_refused_where_holes_are_cached_and_only_there(world, tmp_path):
    (_, plain), _, (_, holed), _ = samples()
    write_set(tmp_path / "shards", "phantom", [("train", plain), ("train", holed)], 4)
    settings = config(world, tmp_path / "cache", structure="mask", flips=())
    data = settings.data.model_copy(update={"shards": tmp_path / "shards"})
    with pytest.raises(ShardError) as error:
        fill_cache(PrecomputeConfig(data=data, splits=("train",)), 0, 1)
    assert str(error.value) == (
        f"{tmp_path}/shards/train-000000.tar: sample {holed.key} of train has an inpaint_mask of its own: what it "
        "hides is unknown and cannot teach a model to fill holes; pack it with `ccmdist shards folders`, which keeps "
        "such people out of train, or leave out data.holes"
    )
    usual = data.model_copy(update={"holes": None})
    assert fill_cache(PrecomputeConfig(data=usual, splits=("train",)), 0, 1)


def test_a_dry_run_tells_structure_and_holes(world, tmp_path):
    text = describe(config(world, tmp_path))
    assert text.endswith(
        "4 samples are to be encoded by Qwen-Image-Edit 2509, nerves as mask and points, each with 3 holes "
        "(rectangle, stroke, band, quadrant, everything)"
    )
    assert describe(config(world, tmp_path, structure="mask", holes=None)).endswith("by Qwen-Image-Edit 2509")
