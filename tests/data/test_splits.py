"""Groups, folds and held-out shares of a training split: against slow references, and through each source."""

import csv
from itertools import product

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_segformer.config import DataConfig, SplitConfig
from hf_segformer.data.labeled import open_source
from hf_segformer.data.splits import (
    add_groups,
    assign_folds,
    count_division,
    divide,
    format_division,
    group_names,
    held_out_groups,
    image_paths,
    seen_images,
    write_division,
)
from hf_segformer.training.data import load_data

NAMES = ["a", "b"]
DRIVES = {"0001TP": 2, "0006R0": 3, "0016E5": 4}
BY_DRIVE = "^([^_]+)_"


def write_pair(root, images, masks, name, seed=0):
    rng = np.random.default_rng(seed)
    for folder in (images, masks):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(root / images / f"{name}.png")
    Image.fromarray(rng.integers(0, 2, (16, 20), dtype=np.uint8)).save(root / masks / f"{name}.png")


@pytest.fixture
def drives(tmp_path):
    """CamVid's layout: nine training images of three drives, and two of the last one to evaluate on."""
    for drive, count in DRIVES.items():
        for index in range(count):
            write_pair(tmp_path, "train", "trainannot", f"{drive}_{index:03}")
    for index in (8, 9):
        write_pair(tmp_path, "val", "valannot", f"0016E5_{index:03}")
    return tmp_path


def names_of(dataset):
    return [path.rpartition("/")[2].removesuffix(".png") for path in image_paths(dataset)]


class TestGroupNames:
    def test_the_first_bracket_or_the_whole_match_is_the_group(self):
        assert group_names(["x_12_a.png", "y_7.png"], r"_(\d+)(_a)?") == ["12", "7"]
        assert group_names(["x_12_a.png", "y_7.png"], r"\d+") == ["12", "7"]

    def test_names_that_do_not_match_are_refused_with_an_example(self):
        with pytest.raises(ValueError, match=r"split.group '\^p' is not found in the image name 'a', nor in 1 others"):
            group_names(["p1", "a", "b"], "^p", "split.group")
        with pytest.raises(ValueError, match="not found in the image name 'b'"):  # the bracket takes no part there
            group_names(["a", "b"], "(a)|b")


class TestFolds:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.integers(2, 4), st.integers(0, 3))
    def test_every_group_is_in_one_fold_and_no_fold_is_empty(self, members, num_folds, seed):
        groups = [f"g{member}" for member in members]
        if len(set(groups)) < num_folds:
            with pytest.raises(ValueError, match="at most the number of groups"):
                assign_folds(len(groups), num_folds, seed, groups)
            return
        folds = assign_folds(len(groups), num_folds, seed, groups)
        assert sorted(set(folds)) == list(range(num_folds))
        assert all(len({fold for fold, own in zip(folds, groups, strict=True) if own == name}) == 1 for name in groups)
        order = np.random.default_rng(9).permutation(len(groups))  # the order of the files does not matter
        shuffled = assign_folds(len(groups), num_folds, seed, [groups[place] for place in order])
        assert (shuffled == folds[order]).all()

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=3, max_size=6), st.integers(0, 3))
    def test_the_largest_fold_is_within_four_thirds_of_the_best_of_all_assignments(self, sizes, seed):
        groups = [f"g{index}" for index, size in enumerate(sizes) for _ in range(size)]
        found = np.bincount(assign_folds(len(groups), 3, seed, groups)).max()
        best = min(
            max(sum(size for size, fold in zip(sizes, choice, strict=True) if fold == each) for each in range(3))
            for choice in product(range(3), repeat=len(sizes))
        )
        assert best <= found <= 4 / 3 * best

    def test_single_images_differ_by_one_and_follow_the_seed(self):
        folds = assign_folds(11, 4, seed=1)
        assert sorted(np.bincount(folds)) == [2, 3, 3, 3]
        assert (folds == assign_folds(11, 4, seed=1)).all()
        assert (folds != assign_folds(11, 4, seed=2)).any()

    def test_the_folds_of_a_split_are_its_images_once_each(self, drives):
        config, seen = DataConfig("camvid", root=str(drives)), []
        for fold in range(3):
            source = open_source(config, SplitConfig(folds=3, fold=fold))
            assert len(source.pool) == 9
            train, held_out = names_of(source.train), names_of(source.evaluation)
            assert not set(train) & set(held_out)
            assert train == sorted(train)
            assert len(train) + len(held_out) == 9
            seen += held_out
        assert sorted(seen) == [f"{drive}_{index:03}" for drive, count in DRIVES.items() for index in range(count)]

    def test_generated_shapes_have_folds(self):
        config = DataConfig("shapes", image_size=16, num_train=5, num_eval=1)
        whole, source = open_source(config), open_source(config, SplitConfig(folds=2, fold=1))
        assert (len(source.train), len(source.evaluation)) in ((3, 2), (2, 3))
        images = [bytes(str(row["image"]), "utf-8") for row in whole.train]
        assert {bytes(str(row["image"]), "utf-8") for row in source.evaluation} < set(images)

    def test_pages_of_a_file_stay_on_one_side(self):
        files = [f"/data/{name}.tif" for name in "abcdefgh" for _ in range(10)]
        rows = Dataset.from_dict({"image": files, "label": files, "page": list(range(10)) * 8})
        train, held_out = divide(rows, SplitConfig(), 0.25, 0, "the data")
        assert not set(train["image"]) & set(held_out["image"])
        assert len(held_out) == 20
        one = Dataset.from_dict({"image": files[:10], "label": files[:10], "page": list(range(10))})
        train, held_out = divide(one, SplitConfig(), 0.2, 0, "the data")  # there is no other way
        assert (len(train), len(held_out)) == (8, 2)

    def test_pages_of_a_file_share_a_fold(self):
        dataset = Dataset.from_dict({"image": [f"{n}.tif" for n in "aabbcc"], "label": ["m"] * 6, "page": [0, 1] * 3})
        divided = add_groups(dataset, SplitConfig(folds=3), ".", None)
        for fold in range(3):
            _, held_out = divide(divided, SplitConfig(folds=3, fold=fold), 0, 0, "pages")
            assert len(set(held_out["image"])) == 1

    def test_folds_of_other_bands_share_one_processor(self, tmp_path):
        """Otherwise their models could not be averaged: sizes and statistics are those of the images of all folds."""
        for index in range(4):
            for folder in ("images", "masks"):
                (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / "images" / f"{index}.npy", np.full((2, 16 + index, 20), index, np.uint16))
            Image.new("L", (20, 16 + index)).save(tmp_path / "masks" / f"{index}.png")
        config = DataConfig("folders", root=str(tmp_path), names=NAMES)
        processors = [load_data(config, 2, SplitConfig(folds=2, fold=fold)).processor.to_dict() for fold in (0, 1)]
        assert processors[0] == processors[1]
        assert processors[0]["size"] == {"shortest_edge": 16}
        assert processors[0]["image_mean"][0] == pytest.approx((0 * 16 + 1 * 17 + 2 * 18 + 3 * 19) / 70)


class TestHoldOut:
    def test_named_drives_of_camvid_are_held_out_and_its_other_splits_untouched(self, drives):
        split = SplitConfig(group=BY_DRIVE, hold_out=["0001TP", "0016E5"])
        source = open_source(DataConfig("camvid", root=str(drives)), split)
        assert names_of(source.train) == ["0006R0_000", "0006R0_001", "0006R0_002"]
        assert len(source.evaluation) == 6
        assert all("/train/" in path for path in image_paths(source.evaluation))
        assert format_division(source.train, source.evaluation).splitlines() == [
            "Groups of images, with their numbers of images:",
            "  train       3 images in 1 group: 0006R0 3",
            "  evaluation  6 images in 2 groups: 0016E5 4, 0001TP 2",
        ]
        expected = {"train": {"images": 3, "groups": 1}, "evaluation": {"images": 6, "groups": 2}}
        assert count_division(source.train, source.evaluation) == expected

    def test_unknown_groups_name_the_known_ones(self, drives):
        with pytest.raises(ValueError, match=r"hold_out has '0002'; expected groups of .*: 0001TP, 0006R0, 0016E5"):
            open_source(DataConfig("camvid", root=str(drives)), SplitConfig(group=BY_DRIVE, hold_out=["0002"]))
        with pytest.raises(ValueError, match="every group"):
            open_source(DataConfig("camvid", root=str(drives)), SplitConfig(group=BY_DRIVE, hold_out=[*DRIVES]))

    def test_folders_with_the_split_as_a_subfolder_or_without(self, tmp_path):
        split = SplitConfig(group="^(p1)|^(p2)", hold_out=["p1"])
        for name in ("train/p1/0", "train/p2/0", "val/p3/0"):
            write_pair(tmp_path, "images", "masks", name)
        with pytest.raises(ValueError, match=r"split.group .* 'p2/0.png'"):
            open_source(DataConfig("folders", root=str(tmp_path), names=NAMES), split)
        split = SplitConfig(group="^[^/]+", hold_out=["p1"])
        source = open_source(DataConfig("folders", root=str(tmp_path), names=NAMES), split)
        assert [len(source.train), len(source.evaluation)] == [1, 1]
        split = SplitConfig(group="p[0-9]", hold_out=["p3"])
        whole = DataConfig("folders", root=str(tmp_path), names=NAMES, image_folder="images", train_split="all")
        assert [len(rows) for rows in (open_source(whole, split).train, open_source(whole, split).evaluation)] == [2, 1]

    def test_an_imagefolder_by_name_and_by_column(self, tmp_path):
        rows = []
        for index in range(6):
            write_pair(tmp_path / "train", ".", "masks", f"p{index // 2}_{index}")
            rows.append(
                f'{{"file_name": "p{index // 2}_{index}.png", "label_file_name": "masks/p{index // 2}_{index}.png"'
                f', "patient": "P{index // 2}"}}'
            )
        (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(rows))
        config = DataConfig("imagefolder", root=str(tmp_path), names=NAMES)
        by_name = open_source(config, SplitConfig(group=r"train/(p\d)_", hold_out=["p1"]))
        by_column = open_source(config, SplitConfig(column="patient", hold_out=["P1"]))
        assert names_of(by_name.evaluation) == names_of(by_column.evaluation) == ["p1_2", "p1_3"]
        with pytest.raises(ValueError, match=r"split.column is 'person'; expected one of .*'patient'"):
            open_source(config, SplitConfig(column="person", hold_out=["P1"]))

    def test_columns_of_class_names_and_rows_without_names(self, tmp_path):
        image = Image.new("RGB", (20, 16))
        features = Features({"image": ImageColumn(), "label": ImageColumn(), "film": ClassLabel(names=["x", "y"])})
        rows = [{"image": image, "label": image.convert("L"), "film": film} for film in (0, 0, 1)]
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
        config = DataConfig("dataset", root=str(tmp_path / "saved"), names=NAMES)
        source = open_source(config, SplitConfig(column="film", hold_out=["y"]))
        assert [len(source.train), len(source.evaluation)] == [2, 1]
        with pytest.raises(ValueError, match=r"have no file names: set split.column"):
            open_source(config, SplitConfig(group="x", hold_out=["x"]))

    def test_an_empty_cell_is_no_group(self, tmp_path):
        dataset = Dataset.from_dict({"image": ["a", "b"]}, features=Features({"image": Value("string")}))
        with pytest.raises(ValueError, match="empty in row 1"):
            add_groups(dataset, SplitConfig(column="film", hold_out=["x"]), tmp_path, ["x", None])


class TestShare:
    def test_without_groups_single_images_are_drawn_as_ever(self, drives):
        config = DataConfig("camvid", root=str(drives), eval_share=0.3, seed=4)
        order = np.random.default_rng(4).permutation(9)
        expected = [sorted(order[3:]), sorted(order[:3])]
        pool = [f"{drive}_{index:03}" for drive, count in DRIVES.items() for index in range(count)]
        source = open_source(config)
        assert names_of(source.train) == [pool[place] for place in expected[0]]
        assert names_of(source.evaluation) == [pool[place] for place in expected[1]]

    @pytest.mark.parametrize("seed", range(6))
    def test_whole_groups_are_drawn_while_they_bring_the_share_nearer(self, drives, seed):
        config = DataConfig("camvid", root=str(drives), eval_share=0.4, seed=seed)
        source = open_source(config, SplitConfig(group=BY_DRIVE))
        held_out, rest = ({name[:6] for name in names_of(rows)} for rows in (source.evaluation, source.train))
        assert not held_out & rest
        total, expected = 0, set()  # the rule, spelt out
        for place in np.random.default_rng(seed).permutation(3):
            drive = sorted(DRIVES)[place]
            if abs(total + DRIVES[drive] - 3.6) < abs(total - 3.6):
                total, expected = total + DRIVES[drive], expected | {drive}
        assert held_out == expected

    def test_the_smallest_group_is_held_out_if_all_are_too_large(self, drives):
        config = DataConfig("camvid", root=str(drives), eval_share=0.01)
        assert {name[:6] for name in names_of(open_source(config, SplitConfig(group=BY_DRIVE)).evaluation)} == {
            "0001TP"
        }

    def test_one_group_cannot_be_divided(self, drives):
        config = DataConfig("camvid", root=str(drives), eval_share=0.5)
        with pytest.raises(ValueError, match="has one group, 00; expected at least two"):
            open_source(config, SplitConfig(group="^00"))


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"group": "("}, "split.group is '\\('; expected a regular expression"),
            ({"group": "a", "column": "b"}, "leave one of them out"),
            ({"hold_out": ["a"]}, "set split.group=REGEX"),
            ({"group": "a", "hold_out": ["a"], "folds": 2}, "leave one of them out"),
            ({"group": "a", "hold_out": ["a", "a"]}, "more than once"),
            ({"folds": 1}, "expected 2 to 20"),
            ({"folds": 21}, "expected 2 to 20"),
            ({"folds": 3, "fold": 3}, "expected 0 to 2"),
            ({"fold": 1}, "expected 0 without split.folds"),
        ],
    )
    def test_values_out_of_range(self, fields, message):
        with pytest.raises(ValueError, match=message):
            SplitConfig(**fields)

    @pytest.mark.parametrize(
        ("data", "split", "message"),
        [
            ({"source": "dataset", "streaming": True}, {"folds": 2}, "set data.streaming=false"),
            ({"source": "shapes", "num_train": 1, "num_eval": 1}, {"folds": 2, "group": "a"}, "generated"),
            ({"source": "folders"}, {"column": "a", "folds": 2}, "have no columns"),
            ({"source": "folders", "eval_share": 0.1}, {"folds": 2}, "set data.eval_share=0"),
            ({"source": "folders", "eval_split": "x"}, {"folds": 2}, "set data.eval_split=''"),
            ({"source": "folders"}, {"group": "a"}, "set split.hold_out, split.folds or data.eval_share=0.1"),
        ],
    )
    def test_combinations_name_the_remedy(self, data, split, message):
        with pytest.raises(ValueError, match=message):
            SplitConfig(**split).check_with(DataConfig(root="x", **data))


class TestSeenImages:
    def test_images_of_the_training_side_are_known_again_by_their_files(self, drives, tmp_path):
        source = open_source(DataConfig("camvid", root=str(drives)), SplitConfig(folds=2, group=BY_DRIVE))
        run = tmp_path / "run"
        run.mkdir()
        write_division(run, source.train, source.evaluation)
        rows = list(csv.DictReader((run / "split.csv").read_text().splitlines()))
        assert len(rows) == 9
        assert {row["group"] for row in rows if row["side"] == "evaluation"} == {
            n[:6] for n in names_of(source.evaluation)
        }
        assert held_out_groups(run) == sorted({name[:6] for name in names_of(source.evaluation)})
        assert seen_images([run], source.pool) == image_paths(source.train)
        assert seen_images([run], source.evaluation) == []
        link = tmp_path / "link"
        link.symlink_to(drives, target_is_directory=True)
        other = open_source(DataConfig("camvid", root=str(link)), SplitConfig(folds=2, group=BY_DRIVE))
        assert len(seen_images([run], other.train)) == len(source.train)

    def test_a_share_of_groups_is_drawn_from_all_folders(self, tmp_path):
        for split, number in (("train", 6), ("val", 4)):
            for kind in ("images", "masks"):
                (tmp_path / kind / split).mkdir(parents=True)
                for index in range(number):
                    Image.new("L", (8, 6), index % 2).save(tmp_path / kind / split / f"{split}{index}.png")
        config = DataConfig("folders", root=str(tmp_path), eval_share=0.5)
        source = open_source(config, SplitConfig(group="([0-9])"))
        assert len(source.train) + len(source.evaluation) == 10
        sides = [{name[-5] for name in image_paths(side)} for side in (source.train, source.evaluation)]
        assert sides[0].isdisjoint(sides[1])

    def test_pages_of_one_file_are_told_apart(self, tmp_path):
        for name in ("images", "masks"):
            (tmp_path / "data" / name).mkdir(parents=True)
            first, *others = [Image.new("L", (8, 6), page) for page in range(6)]
            first.save(tmp_path / "data" / name / "stack.tif", save_all=True, append_images=others)
        config = DataConfig("folders", root=str(tmp_path / "data"), eval_share=0.3, pages=True)
        source = open_source(config)
        write_division(tmp_path, source.train, source.evaluation)
        assert seen_images([tmp_path], source.evaluation) == []
        assert seen_images([tmp_path], source.train) == image_paths(source.train)
        whole = Dataset.from_dict({"image": image_paths(source.train)[:1]})
        assert len(seen_images([tmp_path], whole)) == 1
        (tmp_path / "split.csv").write_text(f"image,side,group\n{image_paths(whole)[0]},train,\n")  # an earlier form
        assert len(seen_images([tmp_path], source.evaluation)) == len(source.evaluation)

    def test_folders_without_the_file_tell_nothing(self, drives, tmp_path):
        source = open_source(DataConfig("camvid", root=str(drives)))
        assert seen_images([tmp_path / "none"], source.train) == []


def test_a_single_image_is_not_divided():
    with pytest.raises(ValueError, match="data has 1 image; expected at least two, one to train on and one held out"):
        divide(Dataset.from_dict({"image": ["a.png"]}), SplitConfig(), 0.1, 0, "data")
