import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from deploykit.data import policies
from deploykit.data.augment import augment
from deploykit.recipe.sections import AugmentSection

NAMES = ("flip", "crop", "rotate", "color", "rand-augment", "auto-augment", "mixup", "cutmix")
ALONE = tuple(name for name in NAMES if name not in {"mixup", "cutmix"})
SEED = (0, "train", 1, 7)
each = pytest.mark.parametrize("name", NAMES)
each_alone = pytest.mark.parametrize("name", ALONE)


def batch(count=32, channels=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, channels, size, size), generator=generator)
    classes = torch.randint(5, (count,), generator=generator)
    return images, torch.nn.functional.one_hot(classes, 5).float()


def same_image(count=64, size=16):
    return batch(1, size=size)[0].expand(count, -1, -1, -1).contiguous(), torch.eye(count)


def run(name, images, targets, seed_parts=SEED, **settings):
    return augment(images, targets, [AugmentSection(name=name, **settings)], seed_parts=seed_parts)


def distinct(images):
    return len({image.numpy().tobytes() for image in images})


@each
def test_equal_seed_parts_give_equal_bits(name):
    first, second = run(name, *batch()), run(name, *batch())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@each
def test_another_step_gives_another_change(name):
    assert not torch.equal(run(name, *batch())[0], run(name, *batch(), (0, "train", 1, 8))[0])


@each
def test_global_random_state_is_neither_read_nor_moved(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global state is the subject
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        results.append(run(name, *batch())[0])
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
        assert before[2] == random.getstate()
    assert torch.equal(*results)


@each
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [2, 8, 15])
def test_shape_dtype_and_range_stay(name, channels, size):
    images, targets = batch(16, channels, size)
    kept = images.clone(), targets.clone()
    out, soft = run(name, images, targets)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert out.min() >= 0
    assert out.max() <= 1
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    assert torch.equal(images, kept[0])
    assert torch.equal(targets, kept[1])


@each
def test_probability_zero_changes_nothing(name):
    images, targets = batch()
    out, soft = run(name, images, targets, probability=0.0)
    assert torch.equal(out, images)
    assert torch.equal(soft, targets)


@each
def test_probability_is_the_share_of_samples_that_may_change(name):
    images, targets = batch(400, size=8)
    out, soft = run(name, images, targets, probability=0.3)
    changed = ((out != images).flatten(1).any(1) | (soft != targets).any(1)).float().mean()
    assert 0.02 < changed < 0.38


@each
def test_a_batch_of_one_and_of_none_pass(name):
    for count in (0, 1):
        assert len(run(name, *batch(count))[0]) == count


def test_every_sample_draws_its_own_policy():
    images, targets = same_image()
    assert distinct(images) == 1
    least = {"flip": 2, "crop": 30, "rotate": 60, "color": 60, "rand-augment": 40}
    for name, count in {**least, "auto-augment": 15}.items():
        assert distinct(run(name, images, targets)[0]) >= count, name


def test_samples_of_a_batch_draw_different_operations(monkeypatch):
    used = []
    for name, operation in policies._OPERATIONS.items():

        def spy(images, levels, name=name, operation=operation):
            used.append((name, len(images)))
            return operation(images, levels)

        monkeypatch.setitem(policies._OPERATIONS, name, spy)
    run("rand-augment", *same_image(200), operations=1)
    assert {name for name, _ in used} == set(policies._RAND_AUGMENT) - {"identity"}
    assert max(count for _, count in used) < 40
    used.clear()
    run("auto-augment", *same_image(200))
    assert len({name for name, _ in used}) > 8


def test_kornias_own_container_would_fail_the_test_of_policies():
    """The negative control: one draw a batch leaves equal images alike in kind."""
    import kornia.augmentation.auto as auto

    torch.manual_seed(0)
    policy = auto.RandAugment(n=1, m=9, policy=[[("invert", 0.0, 1.0)], [("equalize", 0.0, 1.0)]])
    assert distinct(policy(same_image()[0])) == 1


@each_alone
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    images, targets = batch()
    others = torch.rand_like(images)
    others[3] = images[3]
    first, second = run(name, images, targets)[0][3], run(name, others, targets)[0][3]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@each_alone
def test_targets_stay_where_images_keep_their_class(name):
    images, targets = batch()
    assert torch.equal(run(name, images, targets)[1], targets)


def test_sections_apply_in_their_order():
    images, targets = batch()
    flip, crop = AugmentSection(name="flip"), AugmentSection(name="crop")
    both = augment(images, targets, [flip, crop], seed_parts=SEED)[0]
    first = augment(images, targets, [flip], seed_parts=SEED)[0]
    assert not torch.equal(both, first)
    assert not torch.equal(both, augment(images, targets, [crop, flip], seed_parts=SEED)[0])


def test_flip_mirrors_half_of_the_samples():
    images, targets = batch(1000, size=4)
    out, _ = run("flip", images, targets)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert 430 < mirrored.sum() < 570
    assert torch.equal(out[~mirrored], images[~mirrored])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(2, 9), st.integers(0, 1000))
def test_crop_moves_pixels_and_fills_with_black(padding, size, seed):
    images, targets = batch(6, size=size)
    out, _ = run("crop", images, targets, (seed,), padding=padding)
    bordered = torch.nn.functional.pad(images, (padding,) * 4)
    for image, cut in zip(bordered, out, strict=True):
        windows = image.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4)
        assert (windows == cut).flatten(2).all(2).any()


def test_rotation_by_a_quarter_turn_is_exact():
    images = batch(2)[0]
    turned = policies.rotate(images, torch.tensor([90.0, -90.0]))
    torch.testing.assert_close(turned[0], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(turned[1], images[1].rot90(-1, (1, 2)), rtol=0, atol=1e-4)


def test_rotation_of_zero_degrees_is_the_image():
    images, targets = batch()
    out, _ = run("rotate", images, targets, degrees=0.0)
    torch.testing.assert_close(out, images, rtol=0, atol=1e-5)


def test_color_of_no_strength_is_the_image():
    images, targets = batch()
    out, _ = run("color", images, targets, strength=0.0)
    torch.testing.assert_close(out, images, rtol=0, atol=1e-6)


def test_rand_augment_is_stronger_with_magnitude():
    images, targets = batch(128)
    shifts = [
        (run("rand-augment", images, targets, magnitude=level)[0] - images).abs().mean()
        for level in (1, 15, 30)
    ]
    assert shifts == sorted(shifts)


def coded(count=64):
    """Images whose value says which target they have."""
    values = torch.arange(count) / count
    return values.view(-1, 1, 1, 1).expand(-1, 1, 12, 12).contiguous(), torch.eye(count), values


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 1e-3])
def test_mixed_targets_have_the_shares_of_the_mixed_pixels(name, alpha):
    images, targets, values = coded()
    out, soft = run(name, images, targets, alpha=alpha)
    torch.testing.assert_close(out.mean((1, 2, 3)), soft @ values, rtol=0, atol=1e-5)
    assert (soft >= 0).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_every_sample_mixes_by_a_share_of_its_own(name):
    images, targets, _ = coded()
    shares = run(name, images, targets, alpha=1.0)[1].amax(1)
    assert len({round(float(share), 3) for share in shares}) > 20


def test_cutmix_pastes_one_box():
    images, targets, values = coded()
    out, _ = run("cutmix", images, targets, alpha=1.0)
    for image, value in zip(out[:, 0], values, strict=True):
        foreign = image != value
        rows, columns = foreign.any(1), foreign.any(0)
        assert foreign.sum() == rows.sum() * columns.sum()


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    pixels[1] = pixels[1] // 3 + 40
    pixels[2] = 77
    pixels[3] = np.arange(24, dtype=np.uint8)[:, None, None] * 5
    return pixels


@pytest.mark.parametrize(
    ("name", "level", "pillow", "steps"),
    [
        ("auto_contrast", 0, ImageOps.autocontrast, 1),
        ("equalize", 0, ImageOps.equalize, 1),
        ("invert", 0, ImageOps.invert, 0.01),
        ("posterize", 1.0, lambda image: ImageOps.posterize(image, 4), 0.01),
        ("solarize", 0.5, lambda image: ImageOps.solarize(image, 128), 0.01),
        ("brightness", 1 / 3, lambda image: ImageEnhance.Brightness(image).enhance(1.3), 1.1),
        ("contrast", -2 / 3, lambda image: ImageEnhance.Contrast(image).enhance(0.4), 1.1),
        ("color", 7 / 9, lambda image: ImageEnhance.Color(image).enhance(1.7), 1.5),
        ("sharpness", 7 / 9, lambda image: ImageEnhance.Sharpness(image).enhance(1.7), 1.5),
        ("identity", 1.0, lambda image: image, 0),
    ],
)
def test_operations_agree_with_pillow_within_rounding(pictures, name, level, pillow, steps):
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    out = policies._OPERATIONS[name](images, torch.full((5,), float(level)))
    expected = np.stack([np.asarray(pillow(Image.fromarray(picture))) for picture in pictures])
    difference = out.permute(0, 2, 3, 1).numpy() * 255 - expected
    assert np.abs(difference).max() <= steps


@pytest.mark.parametrize(
    ("name", "shift", "axis"), [("translate_x", 3, -1), ("translate_y", -3, -2)]
)
def test_translation_moves_whole_pixels(name, shift, axis):
    images = batch(2, size=16)[0]
    level = torch.full((2,), shift / (16 * policies._TRANSLATION))
    moved = policies._OPERATIONS[name](images, level)
    expected = images.roll(shift, axis)
    edge = slice(None, shift) if shift > 0 else slice(shift, None)
    expected.movedim(axis, 0)[edge] = 0
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


def test_all_published_policies_are_made_of_known_operations():
    for large in (False, True):
        table = policies._published_policies(large=large)
        assert len(table) == 25
        for policy in table:
            assert len(policy) == 2
            for name, probability, level in policy:
                assert name in policies._OPERATIONS
                assert 0 <= probability <= 1
                assert level is None or 0 <= level <= 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
def test_cuda_draws_what_the_cpu_draws(name):
    images, targets = batch()
    out, soft = run(name, images.cuda(), targets.cuda())
    again, _ = run(name, images.cuda(), targets.cuda())
    assert out.is_cuda
    assert torch.equal(out, again)
    close = (out.cpu() - run(name, images, targets)[0]).abs() < 1e-3
    assert close.float().mean() > 0.99
    torch.testing.assert_close(soft.cpu(), run(name, images, targets)[1])
