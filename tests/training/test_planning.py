"""Rules of a plan: values by hand, by the recipes that they quote, and within the time."""

import tomllib
from dataclasses import replace

import pytest

from hf_segformer.data.description import DataDescription
from hf_segformer.training.plan import (
    GIVEN,
    Budget,
    Cost,
    Machine,
    Pretrained,
    default_output_dir,
    format_duration,
    parse_duration,
)
from hf_segformer.training.planning import RULES, plan_run
from hf_segformer.training.recipe import parse_overrides, read_recipe

GB = 10**9
ROADS = DataDescription(
    layout="CamVid",
    tables={"source": "camvid", "root": "."},
    mask_kind="indices",
    names=("road", "sky", "pole"),
    names_source="the layout",
    num_channels=3,
    image_dtype="uint8",
    value_share=1.0,
    sizes=((360, 480),) * 5,
    num_train=367,
    num_eval=101,
    class_shares=(0.70, 0.29, 0.01),
    class_image_shares=(1.0, 1.0, 0.4),
    num_sampled=200,
    notes=("Found it.",),
)
COSTS = {"b0": 1.0, "b1": 2.2, "b2": 4.1}  # seconds of a step of 8 crops of 256x256


class Bench:
    """A machine whose costs are proportional to pixels and to the variant; it keeps the trials."""

    def __init__(self, bf16=1.0, image_bytes=100 * 2**20, reading=0.01, evaluation=0.1, speed=1.0):
        self.bf16, self.image_bytes, self.reading, self.evaluation, self.speed = (
            bf16,
            image_bytes,
            reading,
            evaluation,
            speed,
        )
        self.trials = []

    def __call__(self, tables):
        self.trials.append(tables)
        variant, crop = tables["model"].get("variant", "b0"), tables["augmentation"]["crop_size"] / 256
        share = tables["trainer"]["per_device_train_batch_size"] / 8 * crop**2
        seconds = COSTS[variant] * share * (self.bf16 if tables["trainer"].get("bf16") else 1) / self.speed
        return Cost(seconds, self.reading, self.evaluation, int(self.image_bytes * crop**2))


def machine(device="cpu", memory=16 * GB, processors=2, has_bfloat16=False, bench=None, **others):
    return Machine(device, memory, processors, has_bfloat16, bench or Bench(), **others)


def plan(description=ROADS, budget=None, overrides=(), pretrained=None, on=None, **changes):
    return plan_run(
        replace(description, **changes), budget or Budget(steps=9000), on or machine(), overrides, pretrained
    )


def values(found):
    return {each.key: each.value for each in found.decisions}


def reasons(found):
    return {each.key: each.reason for each in found.decisions}


def of_recipe(name, *keys):
    tables = read_recipe(name, ["data.root=."]).tables
    return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in keys}


B0 = Pretrained("owner/b0", 3, "SegFormer B0", "other")
LIKE_CAMVID = (
    *(
        "augmentation.scale",
        "augmentation.crop_size",
        "loss.cross_entropy",
        "loss.dice",
        "optimizer.head_lr_multiplier",
        "model.variant",
    ),
    *("trainer.learning_rate", "trainer.weight_decay", "trainer.warmup_steps", "trainer.max_grad_norm"),
    *("trainer.per_device_train_batch_size", "trainer.dataloader_num_workers", "trainer.logging_steps"),
    *("trainer.dataloader_persistent_workers", "trainer.max_steps", "trainer.save_total_limit", "trainer.seed"),
)
LIKE_SHAPES = (
    *("augmentation.scale", "augmentation.distortion", "model.drop_path_rate", "model.classifier_dropout_prob"),
    *("trainer.learning_rate", "trainer.weight_decay", "optimizer.head_lr_multiplier", "trainer.max_grad_norm"),
)
LIKE_ADE20K = (
    *("trainer.learning_rate", "trainer.weight_decay", "optimizer.head_lr_multiplier", "trainer.max_grad_norm"),
    *("trainer.warmup_steps", "augmentation.crop_size", "augmentation.scale", "augmentation.distortion"),
    *("trainer.per_device_train_batch_size", "augmentation.max_class_share", "trainer.max_steps"),
)


class TestRecipes:
    """The values that a reason quotes are those of the recipe that it names."""

    def test_from_scratch_on_a_cpu_as_camvid_b0(self):
        expected = of_recipe("camvid_b0", *LIKE_CAMVID)
        assert {key: values(plan())[key] for key in LIKE_CAMVID} == expected

    def test_a_short_run_as_shapes_b0(self):
        found = plan(budget=Budget(steps=900), num_train=1200, class_shares=(0.5, 0.3, 0.2))
        assert {key: values(found)[key] for key in LIKE_SHAPES} == of_recipe("shapes_b0", *LIKE_SHAPES)
        assert values(found)["trainer.warmup_steps"] == 90  # a share of 0.1 there
        assert "loss.dice" not in values(found)

    @pytest.mark.parametrize(
        ("overrides", "seconds"),
        [
            ((), 8),  # a worker reads 8 samples
            (["augmentation.cutmix=0.25"], 10),  # and 2 others to paste
            (["augmentation.classmix=0.75"], 14),
            (["augmentation.classmix=0.75", "augmentation.cutmix=0.25"], 16),
        ],
    )
    def test_the_time_of_a_step_holds_the_samples_that_are_pasted(self, overrides, seconds):
        found = plan(overrides=overrides, on=machine(bench=Bench(reading=1.0)))
        assert f"{seconds} s a step" in reasons(found)["trainer.max_steps"]

    def test_larger_crops_at_the_end_take_their_share_of_time_and_all_of_the_memory(self):
        final = ["augmentation.final_crop_size=512", "augmentation.final_share=0.25"]
        roomy, narrow = (plan(overrides=final, on=machine(memory=memory)) for memory in (16 * GB, 4 * GB))
        assert values(roomy)["augmentation.crop_size"] == values(narrow)["augmentation.crop_size"] == 256
        assert "1.8 s a step" in reasons(roomy)["trainer.max_steps"]  # 1 s, and 4 s in a quarter of the steps
        assert values(roomy)["trainer.per_device_train_batch_size"] == 8
        assert values(narrow)["trainer.per_device_train_batch_size"] == 4  # 0.42 GB each in 80 % of 4 GB
        assert "1.7 GB of 4 GB free memory" in reasons(narrow)["trainer.per_device_train_batch_size"]
        assert plan(overrides=final).seconds - plan().seconds == pytest.approx(9000 * 0.75, rel=0.05)

    def test_few_passes_have_a_larger_share_of_large_crops(self):
        """Six passes: a fifth of them is two, rounded up."""
        few = {"num_train": 1200, "budget": Budget(steps=900)}
        plain, larger = (plan(overrides=overrides, **few) for overrides in ((), ["augmentation.final_crop_size=512"]))
        assert larger.seconds - plain.seconds == pytest.approx(900 / 3 * 3, rel=0.05)

    def test_the_variant_is_chosen_by_the_time_of_both_crops(self):
        hours = {"num_train": 2000, "budget": Budget(seconds=10 * 3600), "on": machine(processors=8)}
        assert values(plan(**hours))["model.variant"] == "b1"  # 12,500 steps of 2.2 s
        assert values(plan(overrides=["augmentation.final_crop_size=512"], **hours))["model.variant"] == "b0"

    def test_wrong_crops_are_named_as_they_were_given(self):
        bench = Bench()
        with pytest.raises(ValueError, match=r"augmentation.final_crop_size is 8; expected 0, or at least 16"):
            plan(overrides=["augmentation.final_crop_size=8"], on=machine(bench=bench))
        assert not bench.trials

    def test_a_run_that_stops_early_keeps_its_best_checkpoint(self):
        found = plan(overrides=["early_stopping.patience=2"])
        assert values(found)["trainer.save_strategy"] == "best"
        assert "trainer.save_steps" not in values(found)  # the Trainer does not use it then
        assert found.to_recipe("plan").early_stopping.patience == 2

    def test_from_a_pretrained_encoder_as_the_paper(self):
        on = machine("cuda", bench=Bench(speed=100), processors=16)
        found = plan(
            budget=Budget(steps=160_000),
            overrides=["model.checkpoint=owner/b0"],
            pretrained=B0,
            on=on,
            num_train=20_210,
            sizes=((512, 683), (600, 512), (512, 700)),
        )
        assert {key: values(found)[key] for key in LIKE_ADE20K} == of_recipe("ade20k_b0", *LIKE_ADE20K)
        assert "model.variant" not in values(found)
        assert reasons(found)["model.checkpoint"] == "given: SegFormer B0, licence: other"

    def test_one_class_as_binary_b0(self):
        found = values(plan(names=("lesion",), class_shares=(0.93, 0.07), class_image_shares=(1.0, 0.4)))
        keys = ("loss.dice", "augmentation.max_class_share", "loss.cross_entropy")
        assert {key: found[key] for key in keys} == of_recipe("binary_b0", *keys)
        assert "loss.class_weights" not in found


class TestGiven:
    def test_a_given_value_replaces_its_rule_and_later_rules_see_it(self):
        bench = Bench()
        overrides = ["trainer.per_device_train_batch_size=4", "augmentation.crop_size=128"]
        found = plan(overrides=overrides, on=machine(bench=bench))
        assert values(found)["trainer.gradient_accumulation_steps"] == 2
        assert reasons(found)["augmentation.crop_size"] == GIVEN
        assert all(trial["augmentation"]["crop_size"] == 128 for trial in bench.trials)

    def test_values_without_a_rule_and_of_the_data_are_kept(self):
        found = plan(overrides=["lora.rank=2", "data.seed=3", "data.root=tests", "split.group=^(a)"])
        assert {"lora.rank": 2, "data.seed": 3, "data.root": "tests"}.items() <= values(found).items()
        assert reasons(found)["data.root"] == GIVEN

    def test_given_steps_beat_the_budget(self):
        found = plan(budget=Budget(seconds=3600), overrides=["trainer.max_steps=7"])
        assert values(found)["trainer.max_steps"] == 7
        assert values(found)["trainer.warmup_steps"] == 1

    def test_given_epochs(self):
        for epochs, rate in ((20, 2.5e-3), (21, 1e-3)):  # 367 images: the last step of the epochs is a small one
            found = plan(budget=Budget(), overrides=[f"trainer.num_train_epochs={epochs}"])
            assert values(found)["trainer.learning_rate"] == rate
        found = plan(budget=Budget(), overrides=["trainer.num_train_epochs=100"])
        assert "trainer.max_steps" not in values(found)
        assert values(found)["trainer.warmup_steps"] == 200
        assert found.seconds == pytest.approx(100 * 367 / 8 * 1.04, rel=0.15)

    def test_no_worker_needs_no_persistence(self):
        assert "trainer.dataloader_persistent_workers" not in values(
            plan(overrides=["trainer.dataloader_num_workers=0"])
        )

    @pytest.mark.parametrize("override", ["trainer.max_step=3", "trainr.seed=1", "augmentation.crop_size=wide", "seed"])
    def test_wrong_overrides_are_refused(self, override):
        with pytest.raises(ValueError, match=override.partition("=")[0]):
            plan(overrides=[override])

    def test_values_that_do_not_go_together_are_refused_by_the_recipe(self):
        with pytest.raises(ValueError, match=r"augmentation\.scale"):
            plan(overrides=["augmentation.scale=[2.0, 1.0]"]).to_recipe("run")


class TestTime:
    @pytest.mark.parametrize("seconds", [300, 3600, 7200, 86_400])
    @pytest.mark.parametrize("evaluation", [0.01, 0.5])
    def test_training_checks_and_evaluations_fit_and_fill_it(self, seconds, evaluation):
        found = values(plan(budget=Budget(seconds=seconds), on=machine(bench=Bench(evaluation=evaluation))))
        steps = found["trainer.max_steps"]
        during = steps // found["trainer.eval_steps"] if found["trainer.eval_strategy"] == "steps" else 0
        spent = steps * (1 + 8 * 0.01 / 2) + (during + 1) * 101 * evaluation + 468 * 0.01
        assert 0.85 * seconds < spent < seconds
        assert during * 101 * evaluation <= 0.1 * seconds
        assert during <= 10

    def test_the_estimate_is_the_sum(self):
        found = plan(budget=Budget(steps=1000))
        during = 1000 // values(found)["trainer.eval_steps"]
        assert found.seconds == pytest.approx(1000 * 1.04 + (during + 1) * 10.1 + 4.68 + 2 + 5)

    def test_too_short_a_time_names_one_that_suffices(self):
        with pytest.raises(ValueError, match=r"--time is 10 s; expected at least 25 s: 22 s for checks and evaluation"):
            plan(budget=Budget(seconds=10))
        assert values(plan(budget=Budget(seconds=25)))["trainer.max_steps"] == 1

    @pytest.mark.parametrize(
        ("num_train", "pretrained", "steps"),
        [(20, None, 1000), (367, None, 9175), (367, B0, 4588), (100_000, None, 40_000)],
    )
    def test_the_default_follows_from_the_number_of_images(self, num_train, pretrained, steps):
        overrides = ["model.checkpoint=owner/b0"] if pretrained else []
        found = plan(budget=Budget(), num_train=num_train, pretrained=pretrained, overrides=overrides)
        assert values(found)["trainer.max_steps"] == steps

    def test_one_step_is_a_run(self):
        found = values(plan(budget=Budget(steps=1)))
        assert (found["trainer.eval_strategy"], found["trainer.warmup_steps"], found["trainer.save_steps"]) == (
            "no",
            1,
            1,
        )

    def test_checkpoints_come_every_ten_minutes(self):
        assert values(plan())["trainer.save_steps"] == round(600 / 1.04)

    def test_a_range_test_runs_with_the_network_that_is_trained(self):
        tested = []

        def find(tables):
            tested.append(tables)
            return 3e-4

        found = plan(on=machine(find_learning_rate=find))
        assert values(found)["trainer.learning_rate"] == 3e-4
        assert tested[0]["model"]["variant"] == "b0"
        assert tested[0]["optimizer"]["head_lr_multiplier"] == 1.0
        assert tested[0]["augmentation"]["scale"] == [0.5, 1.75]


class TestMachine:
    def test_little_memory_halves_the_batch_and_accumulates(self):
        found = values(plan(on=machine(memory=GB // 2)))
        assert found["trainer.per_device_train_batch_size"] == 2  # 0.8 x 500 MB hold 3 of 105 MB
        assert found["trainer.gradient_accumulation_steps"] == 4

    def test_less_memory_halves_the_crop(self):
        found = values(plan(on=machine(memory=GB // 5)))
        assert found["augmentation.crop_size"] == 128
        assert 0.8 * GB / 5 >= 2 * 100 * 2**20 / 4

    def test_processes_share_the_batch(self):
        on = machine("cuda", processes=4, processors=32)
        found = values(plan(on=on))
        assert found["trainer.per_device_train_batch_size"] == 4
        assert "trainer.gradient_accumulation_steps" not in found

    def test_few_images_are_a_batch(self):
        assert values(plan(num_train=3, num_eval=1))["trainer.per_device_train_batch_size"] == 3

    @pytest.mark.parametrize(("speed", "pays"), [(0.5, True), (0.95, False), (3.0, False)])
    def test_bfloat16_on_a_cpu_must_be_measured_to_pay(self, speed, pays):
        assert values(plan(on=machine(has_bfloat16=True, bench=Bench(bf16=speed))))["trainer.bf16"] is pays

    def test_bfloat16_on_an_accelerator_is_not_timed(self):
        bench = Bench(bf16=3.0)
        assert values(plan(on=machine("cuda", has_bfloat16=True, bench=bench)))["trainer.bf16"] is True
        assert values(plan(on=machine("cuda")))["trainer.bf16"] is False

    @pytest.mark.parametrize(
        ("device", "processors", "reading", "workers"),
        [("cpu", 1, 0.01, 0), ("cpu", 8, 0.01, 1), ("cuda", 16, 0.01, 1), ("cuda", 16, 0.5, 2), ("cuda", 4, 9.0, 3)],
    )
    def test_workers_read_as_fast_as_the_network_computes(self, device, processors, reading, workers):
        """On an accelerator 16 crops of 512x512 take 8 s; reading 16 x 0.5 s keeps one and a half workers busy."""
        found = plan(on=machine(device, processors=processors, bench=Bench(reading=reading)), sizes=((600, 800),))
        assert values(found)["trainer.dataloader_num_workers"] == workers


class TestNetwork:
    @pytest.mark.parametrize(
        ("num_train", "seconds", "variant"),
        [
            (367, 10**6, "b0"),
            (5000, 10**6, "b1"),
            (20_000, 10**7, "b2"),
            (20_000, 4 * 10**5, "b1"),
            (20_000, 3600, "b0"),
        ],
    )
    def test_the_size_follows_from_images_and_time(self, num_train, seconds, variant):
        """20,000 images 50 times are 125,000 steps of 8: 1.4e5 s with B0, 3.2e5 with B1, 6e5 with B2, of 85 %."""
        assert values(plan(num_train=num_train, budget=Budget(seconds=seconds)))["model.variant"] == variant

    @pytest.mark.parametrize(
        ("channels", "dtype", "pretrained", "expected"),
        [
            (3, "uint8", None, (None, 1.0)),
            (1, "uint8", None, (3, 1.0)),
            (1, "uint8", B0, (3, 1.0)),
            (1, "uint16", None, (1, 0.0)),
            (4, "uint8", None, (4, 0.0)),
            (4, "float32", replace(B0, num_channels=4), (4, 0.0)),
        ],
    )
    def test_channels_and_colours_follow_from_the_images(self, channels, dtype, pretrained, expected):
        overrides = ["model.checkpoint=owner/b0"] if pretrained else []
        found = values(plan(num_channels=channels, image_dtype=dtype, pretrained=pretrained, overrides=overrides))
        assert (found.get("model.num_channels"), found["augmentation.distortion"]) == expected

    def test_bands_that_are_chosen_count(self):
        assert values(plan(num_channels=12, overrides=["data.bands=[1, 4]"]))["model.num_channels"] == 2

    def test_weights_of_other_channels_name_the_remedy(self):
        with pytest.raises(ValueError, match=r"segformer convert owner/b0 NEW --num-channels 5` and give --init NEW"):
            plan(num_channels=5, pretrained=B0, overrides=["model.checkpoint=owner/b0"])


class TestSizes:
    @pytest.mark.parametrize(
        ("device", "sizes", "base", "eval_size", "window", "crop"),
        [
            ("cpu", ((360, 480),), None, None, None, 256),
            ("cpu", ((60, 44),), None, None, None, 32),
            ("cpu", ((600, 800),), [512, 2048], 512, None, 256),
            ("cpu", ((300, 400), (350, 500), (420, 400)), [350, 1400], 350, None, 256),
            ("cuda", ((1024, 2048),), None, None, None, 1024),
            ("cuda", ((1200, 1600),), [1024, 4096], 1024, None, 1024),
            ("cuda", ((512, 600), (600, 512), (500, 700)), [512, 2048], 512, None, 512),
            ("cuda", ((5000, 6000), (4000, 4000), (4500, 4800)), None, 4500, 1024, 1024),
        ],
    )
    def test_sizes(self, device, sizes, base, eval_size, window, crop):
        found = values(plan(sizes=sizes, on=machine(device)))
        keys = ("augmentation.base_size", "data.eval_size", "evaluation.sliding_window", "augmentation.crop_size")
        assert [found.get(key) for key in keys] == [base, eval_size, window, crop]


class TestData:
    @pytest.mark.parametrize(
        ("shares", "dice", "weights", "most"),
        [
            ((0.5, 0.3, 0.2), None, None, 0.75),
            ((0.6, 0.385, 0.015), 1.0, None, 0.75),
            ((0.8, 0.1995, 0.0005), 1.0, "log", 1.0),
            ((0.6, 0.4, 0.0), None, None, 0.75),  # what never occurs cannot be learnt
        ],
    )
    def test_rare_classes_get_dice_and_weights(self, shares, dice, weights, most):
        found = values(plan(class_shares=shares))
        keys = ("loss.dice", "loss.class_weights", "augmentation.max_class_share")
        assert [found.get(key) for key in keys] == [dice, weights, most]

    def test_the_reason_names_the_rare_class(self):
        assert reasons(plan())["loss.dice"].startswith("pole has 1 % of the pixels")

    @pytest.mark.parametrize(("number", "share"), [(1000, 0.1), (50, 0.2), (12, 0.3), (2, 0.3)])
    def test_images_are_held_out_where_there_is_no_split(self, number, share):
        assert values(plan(num_train=number, num_eval=0))["data.eval_share"] == share

    def test_no_share_beside_a_split_of_groups(self):
        assert "data.eval_share" not in values(plan(num_eval=0, overrides=["split.group=^(a)", "split.folds=3"]))
        assert "data.eval_share" not in values(plan())

    def test_the_description_has_held_out_already(self):
        found = plan(tables={**ROADS.tables, "eval_share": 0.2}, num_train=8, num_eval=2)
        assert values(found)["data.eval_share"] == 0.2
        assert values(found)["trainer.per_device_train_batch_size"] == 8

    def test_one_image_cannot_be_divided(self):
        with pytest.raises(ValueError, match="1 image with a mask; expected at least 2"):
            plan(num_train=1, num_eval=0)

    def test_names_without_a_source_ask_for_them(self):
        found = plan(names=("class 0", "class 1"), names_source="generic", class_shares=(0.6, 0.4))
        assert reasons(found)["data.names"] == "2 classes; no names found: set data.names"


class TestPlan:
    def test_the_recipe_has_every_value_and_its_reason(self):
        found = plan()
        assert tomllib.loads(found.to_toml()) == found.tables
        recipe = found.to_recipe("roads")
        assert {table: held for table, held in recipe.tables.items() if held} == found.tables
        assert recipe.text == found.to_toml()
        comments = " ".join(line.removeprefix("# ") for line in recipe.text.splitlines() if line.startswith("#"))
        assert all(each.reason in comments for each in found.decisions)

    def test_only_the_user_names_code(self):
        assert plan(overrides=["augmentation.custom=a:b"]).to_recipe("run").trusted_code == "a:b"

    @pytest.mark.parametrize("width", [80, 140])
    def test_the_table_is_aligned(self, width):
        found = plan(names=tuple(f"class {index}" for index in range(50)), class_shares=(0.02,) * 50)
        lines = found.format_table(width).splitlines()
        keys = [each.key for each in found.decisions]
        assert [line.split()[0] for line in lines if line[0] != " "] == keys
        column = lines[0].index("CamVid")
        assert all(line[column - 1] == " " and line[column] != " " for line in lines)

    def test_every_rule_has_a_known_key_and_a_docstring(self):
        known = parse_overrides([])
        for key, rule in RULES:
            assert key.partition(".")[0] in known
            assert rule.__doc__ or rule.__name__ == "<lambda>", key
        assert len({key for key, _ in RULES}) == len(RULES)

    def test_decisions_are_unique(self):
        keys = [each.key for each in plan(overrides=["data.names=['a', 'b', 'c']"]).decisions]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661)]
)
def test_times_are_parsed(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "2", "h", "-2h", "2h30", "1d", "..h", "2h 3m 1x", "30m2h"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="expected one above 0 such as 2h, 90m, 45s or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (59.7, "1 min"), (90, "1 min 30 s"), (3599.6, "1 h"), (5400, "1 h 30 min"), (3600, "1 h")],
)
def test_times_are_formatted(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("root", "name"), [("a/b", "b"), ("a/b/", "b"), ("/", "run"), ("owner/name", "name")])
def test_a_run_has_the_name_of_its_data(root, name):
    assert default_output_dir(root) == f"outputs/{name}"
