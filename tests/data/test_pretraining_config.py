"""Options of pre-training: each value out of range, and each combination that would have no effect, is refused."""

import pytest

from hf_segformer.data.pretraining_config import ImageAugmentation, ImageDataConfig, PretrainingConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folders"}, "data.source is 'folders'; expected one of shapes, imagefolder, dataset"),
        ({"source": "imagefolder"}, "data.root is not set"),
        ({"source": "shapes"}, "data.num_train is 0; expected at least 1"),
        ({"source": "dataset", "root": "a", "eval_share": 1.0}, "data.eval_share is 1.0"),
        (
            {"source": "dataset", "root": "a", "eval_share": 0.1, "streaming": True},
            "nothing can be held out of a stream",
        ),
        ({"source": "dataset", "root": "a", "eval_share": 0.1, "eval_split": "test"}, "are both set"),
        ({"source": "dataset", "root": "a", "train_split": "validation"}, "held out by data.eval_share=0.1"),
        ({"source": "dataset", "root": "a", "bands": [0]}, "data.bands is [0]"),
        ({"source": "dataset", "root": "a", "value_range": "9,5"}, "data.value_range is '9,5'"),
        ({"source": "shapes", "num_train": 1, "num_eval": 1, "eval_share": 0.5}, "but shapes are generated"),
        ({"source": "shapes", "num_train": 1, "num_eval": 1, "streaming": True}, "but shapes are generated"),
        ({"source": "imagefolder", "root": "a", "streaming": True}, "data.streaming is set for imagefolder"),
        ({"source": "imagefolder", "root": "a", "subset": "b"}, "data.subset is 'b', which is for data.source=dataset"),
        ({"source": "imagefolder", "root": "a", "image_column": "b"}, "data.image_column is 'b'"),
        ({"source": "imagefolder", "root": "a", "label_column": "b"}, "data.label_column is 'b'"),
        ({"source": "imagefolder", "root": "a", "image_size": 32}, "data.image_size is 32, the side of generated"),
        ({"source": "dataset", "root": "a", "image_size": 32}, "data.image_size is 32, the side of generated"),
    ],
)
def test_values_of_data_are_checked(values, message):
    with pytest.raises(ValueError, match=r"^data") as caught:
        ImageDataConfig(**values)
    assert message in str(caught.value)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root is .*/none, which does not exist"):
        ImageDataConfig("imagefolder", root=f"{tmp_path}/none").check_root()
    ImageDataConfig("dataset", root="owner/name").check_root()
    ImageDataConfig("imagefolder", root=str(tmp_path)).check_root()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 8}, "augmentation.crop_size is 8"),
        ({"scale": [0.5, 1.5]}, "augmentation.scale is [0.5, 1.5]"),
        ({"ratio": [0, 1]}, "augmentation.ratio is [0, 1]"),
        ({"flip": 1.5}, "augmentation.flip is 1.5"),
        ({"erasing": -0.1}, "augmentation.erasing is -0.1"),
        ({"randaugment": 11}, "augmentation.randaugment is 11; expected a magnitude from 0 to 10"),
        ({"randaugment_operations": 0}, "augmentation.randaugment_operations is 0"),
        ({"randaugment_operations": 5}, "but augmentation.randaugment is 0, which is none"),
        ({"mixup": float("inf")}, "augmentation.mixup is inf"),
        ({"cutmix": -1.0}, "augmentation.cutmix is -1.0"),
    ],
)
def test_values_of_augmentation_are_checked(values, message):
    with pytest.raises(ValueError, match=r"^augmentation") as caught:
        ImageAugmentation(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dino"}, "pretraining.method is 'dino'; expected one of classification, masked_images"),
        ({"label_smoothing": 1.0}, "pretraining.label_smoothing is 1.0"),
        ({"method": "masked_images", "mask_ratio": 1.0}, "pretraining.mask_ratio is 1.0"),
        ({"method": "masked_images", "mask_size": 0}, "pretraining.mask_size is 0"),
        ({"method": "masked_images", "label_smoothing": 0.1}, "masked images have no classes"),
        ({"mask_ratio": 0.5}, "pretraining.mask_ratio is set, but pretraining.method is classification"),
        ({"mask_size": 16}, "pretraining.mask_size is set, but pretraining.method is classification"),
    ],
)
def test_values_of_the_method_are_checked(values, message):
    with pytest.raises(ValueError, match=r"^pretraining") as caught:
        PretrainingConfig(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"mixup": 0.8}, "augmentation.mixup is 0.8, which is for classification"),
        ({"cutmix": 1.0}, "augmentation.cutmix is 1.0, which is for classification"),
        ({"erasing": 0.25}, "augmentation.erasing is 0.25, which is for classification"),
        ({"crop_size": 200}, "augmentation.crop_size is 200; expected a multiple of pretraining.mask_size, 32"),
        ({"crop_size": 32}, "augmentation.crop_size is 32; expected a multiple of pretraining.mask_size, 32"),
    ],
)
def test_masked_images_need_patches_and_no_classes(augmentation, message):
    options = ImageAugmentation(**augmentation)
    PretrainingConfig().check_with(options)
    with pytest.raises(ValueError, match="augmentation") as caught:
        PretrainingConfig(method="masked_images").check_with(options)
    assert message in str(caught.value)


def test_masked_images_show_at_least_one_patch():
    four = ImageAugmentation(crop_size=64)  # patches of 32 x 32
    with pytest.raises(ValueError, match=r"mask_ratio is 0\.76, which hides all 4 patches; expected at most 0\.75, or"):
        PretrainingConfig(method="masked_images", mask_ratio=0.76).check_with(four)
    PretrainingConfig(method="masked_images", mask_ratio=0.75).check_with(four)
    nine = ImageAugmentation(crop_size=96)
    with pytest.raises(ValueError, match=r"which hides all 9 patches; expected at most 0\.888, or"):
        PretrainingConfig(method="masked_images", mask_ratio=0.889).check_with(nine)
    PretrainingConfig(method="masked_images", mask_ratio=0.888).check_with(nine)
