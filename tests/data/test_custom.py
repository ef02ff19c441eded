"""A user's own augmentation: its call, its seeds, its wrong results, and who may name it."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.custom import CustomAugmentation
from hf_segformer.data.torch_datasets import EpochSampler, TrainDataset, collate

HERE = "tests.data.test_custom"
PLAIN = {"crop_size": 32, "scale": [1.0, 1.0], "max_class_share": 1.0, "flip": 0.0, "distortion": 0.0}


def invert(image, mask):
    return 255 - image, mask[:, ::-1]


def draw(image, mask):
    """Noise from every global generator."""
    image = image.astype(float) + random.randint(-40, 40) + np.random.randint(-40, 40, image.shape)
    return {"image": (image + torch.randint(20, ()).item()).clip(0, 255).astype(np.uint8), "mask": mask, "bboxes": []}


class Pipeline:
    """A stand-in with the call form of albumentations, and a generator of its own."""

    def set_random_seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *arguments, force_apply=False, **data):
        assert not arguments
        shift = int(self.rng.integers(1, 200))
        return {**data, "image": np.roll(data["image"], shift, axis=1), "mask": np.roll(data["mask"], shift, axis=1)}


pipeline = Pipeline()
number = 3


def grow(image, mask):
    return np.pad(image, ((0, 4), (0, 0), (0, 0))), np.pad(mask, ((0, 4), (0, 0)))


def shrink(image, mask):
    return image[:20, :24], mask[:20, :24]


def nothing(image, mask):
    return None


def normalized(image, mask):
    return image / 255.0, mask


def tensors(image, mask):
    return torch.from_numpy(image), mask


def other_size(image, mask):
    return image[:-1], mask


def soft_mask(image, mask):
    return image, mask.astype(float)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count=4):
    rng = np.random.default_rng(0)
    return [
        {
            "image": Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)),
            "label": Image.fromarray(rng.integers(0, 5, (40, 52), dtype=np.uint8)),
        }
        for _ in range(count)
    ]


def dataset(name, **options):
    config = AugmentationConfig(**{**PLAIN, **options}, custom=f"{HERE}:{name}")
    return TrainDataset(rows(), config, SegFormerImageProcessor(), seed=3)


def example():
    image = torch.randint(0, 256, (3, 6, 9), generator=generator(1)).to(torch.uint8)
    return image, torch.randint(0, 5, (6, 9), generator=generator(2))


def test_a_function_gets_arrays_and_returns_a_pair():
    image, labels = example()
    found, marks = CustomAugmentation(f"{HERE}:invert")(image, labels, generator())
    assert torch.equal(found, 255 - image)
    assert torch.equal(marks, labels.flip(1))
    assert (found.dtype, marks.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize(
    ("values", "kind"), [([0, 255], np.uint8), ([-100, 300], np.int16), ([-100, 70_000], np.int32)]
)
def test_the_mask_has_a_type_that_opencv_resamples(values, kind, monkeypatch):
    seen = []
    augmentation = CustomAugmentation(f"{HERE}:invert")
    monkeypatch.setattr(augmentation, "function", lambda image, mask: seen.append(mask) or (image, mask))
    labels = torch.tensor(values)[None]
    _, marks = augmentation(torch.zeros(3, 1, 2), labels, generator())
    assert seen[0].dtype == kind
    assert torch.equal(marks, labels)


def test_global_generators_are_seeded_by_the_sample_and_restored():
    image, labels = example()
    augmentation = CustomAugmentation(f"{HERE}:draw")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, _ = augmentation(image, labels, generator(1))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert torch.equal(first, augmentation(image, labels, generator(1))[0])
    assert not torch.equal(first, augmentation(image, labels, generator(2))[0])


def test_a_pipeline_with_a_generator_of_its_own_is_seeded_by_the_sample():
    image, labels = example()
    augmentation = CustomAugmentation(f"{HERE}:pipeline")
    results = [augmentation(image, labels, generator(seed)) for seed in (1, 2, 1)]
    assert torch.equal(results[0][0], results[2][0])
    assert any(not torch.equal(results[0][0], augmentation(image, labels, generator(seed))[0]) for seed in range(2, 6))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # on one core
@pytest.mark.parametrize("name", ["draw", "pipeline"])
def test_workers_give_the_samples_of_the_main_process(name):
    data = dataset(name, classmix=0.5)
    loaders = [
        DataLoader(data, 2, sampler=EpochSampler(4, 0, lambda: 0), collate_fn=collate, num_workers=workers)
        for workers in (0, 2)
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_it_is_pickled_by_its_path():
    again = pickle.loads(pickle.dumps(CustomAugmentation(f"{HERE}:pipeline")))
    assert again.function is pipeline
    assert b"Pipeline" not in pickle.dumps(CustomAugmentation(f"{HERE}:pipeline"))


def test_a_smaller_result_is_padded():
    sample = dataset("shrink")[0, 0]
    assert sample["pixel_values"].shape == (3, 32, 32)
    assert (sample["labels"][20:] == 255).all()


def test_a_larger_result_is_refused():
    with pytest.raises(ValueError, match=r"test_custom:grow returned 36x32 pixels; expected at most the crop's 32"):
        dataset("grow")[0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"returned NoneType; expected the pair \(image, mask\), or a dictionary"),
        ("normalized", "returned an image of float64; expected uint8, as it was given: normalising is left to"),
        ("tensors", "returned a Tensor as image; expected an array"),
        ("other_size", r"returned an image \(5, 9, 3\) for a mask \(6, 9\); expected \(H, W, 3\) and \(H, W\)"),
        ("soft_mask", r"returned a mask of float64 \(6, 9\); expected integers \(H, W\)"),
    ],
)
def test_wrong_results_are_named(name, message):
    with pytest.raises(ValueError, match=f"augmentation.custom {HERE}:{name} {message}"):
        CustomAugmentation(f"{HERE}:{name}")(*example(), generator())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "there is no module no_such_module; expected one that is installed or is in /"),
        (f"{HERE}:no_such", f"{HERE} has no no_such; expected a callable"),
        (f"{HERE}:number", "a int; expected a callable"),
    ],
)
def test_wrong_paths_are_named(path, message):
    with pytest.raises(ValueError, match=f"augmentation.custom is '{path}', .*{message}"):
        CustomAugmentation(path)


@pytest.mark.parametrize("path", ["module", "module:", ":f", "a/b.py:f", "a:b()", "a:b c"])
def test_a_path_has_one_form(path):
    with pytest.raises(ValueError, match=r"expected module:function, such as"):
        AugmentationConfig(custom=path)


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_augmentation.py").write_text("def twice(image, mask):\n    return image // 2, mask\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    image, labels = example()
    assert torch.equal(CustomAugmentation("my_own_augmentation:twice")(image, labels, generator())[0], image // 2)


def test_bands_in_their_own_units_stay_floats():
    image = torch.randn(5, 6, 9, generator=generator())
    found, _ = CustomAugmentation(f"{HERE}:shrink")(image, torch.zeros(6, 9, dtype=torch.long), generator())
    assert torch.equal(found, image)


def test_an_albumentations_pipeline_works_as_it_is(monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    albumentations = pytest.importorskip("albumentations")
    steps = [albumentations.HorizontalFlip(p=0.5), albumentations.RandomBrightnessContrast(p=1.0)]
    monkeypatch.setitem(globals(), "composed", albumentations.Compose(steps))
    image, labels = torch.arange(54, dtype=torch.uint8).reshape(1, 6, 9).expand(3, -1, -1), torch.arange(9).expand(6, 9)
    augmentation = CustomAugmentation(f"{HERE}:composed")
    results = [augmentation(image, labels, generator(seed)) for seed in range(30)]
    for seed, (found, marks) in enumerate(results):
        again = augmentation(image, labels, generator(seed))
        assert torch.equal(again[0], found)
        assert torch.equal(again[1], marks)
        is_flipped = bool(marks[0, 0] == 8)
        assert torch.equal(marks, labels.flip(1) if is_flipped else labels)
        columns = found[0].float().mean(dim=0).diff()
        assert (columns <= 0).all() if is_flipped else (columns >= 0).all()
    assert 5 < sum(bool(marks[0, 0] == 8) for _, marks in results) < 25
    assert len({found.numpy().tobytes() for found, _ in results}) > 20
