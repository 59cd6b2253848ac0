"""Randomness depends on the seed and the place alone."""

import torch

from ccmdist.diffusion.seeding import generator, generator_of_bits


def draw(source, count=8):
    return torch.randn(count, generator=source)


def test_a_place_gives_the_same_noise_whatever_was_drawn_before():
    first = draw(generator(3, "synthesis", "p0041_os_2", 0))
    torch.randn(17)
    draw(generator(3, "synthesis", "p0007_od_1", 5), 100)
    assert torch.equal(draw(generator(3, "synthesis", "p0041_os_2", 0)), first)


def test_neighbouring_places_and_types_give_other_noise():
    places = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", "0"), (0, "a0")]
    drawn = {tuple(draw(generator(*place)).tolist()) for place in places}
    assert len(drawn) == len(places)


def test_the_noise_is_this_one_on_every_machine():
    expected = torch.tensor([-0.062957011, 1.156972766, -0.631509185])
    found = draw(generator(0, "train", 17), 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_bits_above_those_that_pytorch_reads_count_too():
    low = 12345
    drawn = {tuple(draw(generator_of_bits(low + (high << 32))).tolist()) for high in range(50)}
    assert len(drawn) == 50


def test_many_places_never_share_noise():
    drawn = {float(torch.rand((), generator=generator(0, place), dtype=torch.float64)) for place in range(5000)}
    assert len(drawn) == 5000
