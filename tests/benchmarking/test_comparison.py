"""Benchmarks: candidates that disagree are refused, medians and ratios are right, rows survive, tables are printed."""

from functools import partial

import pytest
import torch

from benchmarks import __main__ as all_rows
from benchmarks import machine as machine_module
from benchmarks import profile, report
from benchmarks import record as records
from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.goals import GOALS, Goal, goal_table, memory
from benchmarks.machine import instructions, machine, processor_of_cpuinfo
from benchmarks.record import Options, Record, file_of, main, read_records, replace_row
from benchmarks.report import SCRIPTS, write_page
from hf_segformer import SegFormerConfig
from hf_segformer.benchmarking.comparison import (
    DisagreementError,
    Measurement,
    compare,
    largest_difference,
    require_agreement,
)
from hf_segformer.benchmarking.memory import peak_memory
from hf_segformer.benchmarking.tasks import Task, format_measurements, gradient_difference, measure, run_model
from hf_segformer.benchmarking.timing import OtherLoad, Timing, interleaved_timing
from hf_segformer.cli.main import main as segformer
from tests.support.commands import assert_one_line, assert_usage_error

MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr("hf_segformer.benchmarking.timing._PAUSE", 0.0)
    monkeypatch.setattr("hf_segformer.benchmarking.timing._RETRY", 0.0)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock:
    """Clock that advances by simulated work only."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def work(self, name, durations):
        durations = iter(durations)

        def call():
            self.order.append(name)
            self.now += next(durations)

        return call


class Others:
    """Other processes that take a given share, round by round."""

    def __init__(self, *shares):
        self.shares = iter(shares)

    def start(self):
        pass

    def share(self):
        return next(self.shares)


def test_samples_are_interleaved_and_medians_are_right():
    clock = Clock()
    calls = {"a": clock.work("a", [9, 1, 5, 2]), "b": clock.work("b", [9, 4, 4, 40])}
    timings = interleaved_timing(calls, rounds=3, clock=clock, load=Others(0.0, 0.0, 0.0))
    assert clock.order == ["a", "b", *"ababab"]
    assert timings["a"].seconds == (1, 5, 2)
    assert (timings["a"].median, timings["b"].median) == (2, 4)
    assert timings["a"].is_quiet is True


def test_short_calls_are_repeated_and_their_mean_is_the_sample():
    clock = Clock()
    timing = interleaved_timing({"a": clock.work("a", [0.04] * 9)}, rounds=2, clock=clock, load=Others(0, 0))["a"]
    assert len(clock.order) == 2 + 2 * 3
    assert timing.seconds == pytest.approx((0.04, 0.04))


def test_a_disturbed_round_is_measured_again():
    clock = Clock()
    calls = {"a": clock.work("a", [1, 1, 100, 3])}
    timing = interleaved_timing(calls, rounds=2, clock=clock, load=Others(0.0, 0.2, 0.04), budget=1000)["a"]
    assert timing.seconds == (1, 3)
    assert (timing.num_disturbed, timing.is_quiet) == (1, True)


def test_all_rounds_count_on_a_busy_machine_and_the_timing_is_marked():
    clock = Clock()
    calls = {"a": clock.work("a", [1] * 99)}
    timing = interleaved_timing(calls, rounds=4, clock=clock, load=Others(*[0.0] + [0.5] * 98), budget=6)["a"]
    assert len(timing.seconds) == 6
    assert timing.is_quiet is False


def test_unknown_load_is_neither_quiet_nor_disturbed():
    clock = Clock()
    timing = interleaved_timing({"a": clock.work("a", [1] * 9)}, rounds=2, clock=clock, load=Others(None, None))["a"]
    assert timing.is_quiet is None


def test_own_work_does_not_count_as_other_load(monkeypatch):
    times = {"busy": 0.0, "own": 0.0, "now": 0.0}
    monkeypatch.setattr("hf_segformer.benchmarking.timing._busy_seconds", lambda: times["busy"])
    monkeypatch.setattr("time.process_time", lambda: times["own"])
    monkeypatch.setattr("time.perf_counter", lambda: times["now"])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    load = OtherLoad()
    times.update(busy=18.0, own=18.0, now=10.0)
    assert load.share() == 0
    times.update(busy=20.03)
    assert load.share() == pytest.approx(0.1)


def constant(value):
    return lambda: torch.full((2, 3), value)


def build_constant(value):
    return constant(value)


def test_a_candidate_that_disagrees_is_not_timed():
    builds = {"first": partial(build_constant, 1.0), "second": partial(build_constant, 1.001)}
    with pytest.raises(DisagreementError, match="second differs by 1"):
        compare(builds, tolerance=1e-4, rounds=1, load=Others(0))
    found = compare(builds, tolerance=1e-2, rounds=1, load=Others(0))
    assert [each.name for each in found] == ["first", "second"]
    assert found[1].difference == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("found", [torch.full((3, 2), 1.0), torch.full((2, 3), torch.nan)])
def test_other_shapes_and_nan_agree_with_nothing(found):
    assert largest_difference(found, torch.ones(2, 3)) == float("inf")
    with pytest.raises(DisagreementError):
        require_agreement({"found": largest_difference(found, torch.ones(2, 3))}, 1.0)


def build_allocation(mebibytes):
    return lambda: torch.ones(mebibytes * MEBIBYTE, dtype=torch.uint8)


@pytest.mark.slow
def test_memory_is_the_peak_of_the_call():
    found = peak_memory(partial(build_allocation, 64))
    if found is None:
        pytest.skip("this system does not tell the peak of memory")
    assert 63 * MEBIBYTE < found < 72 * MEBIBYTE


def test_both_networks_agree_with_their_statistics_and_a_wrong_one_is_noticed(tiny_config, monkeypatch):
    task = Task(tiny_config(), 1, 64, 96)
    [first, ours] = measure(task, rounds=1, load=Others(0), memory_of=())
    assert (first.difference, first.memory) == (None, None)
    assert ours.difference < 1e-5
    build = Task.build_hf_segformer
    monkeypatch.setattr(Task, "build_transformers", lambda self: self.build_hf_segformer())
    monkeypatch.setattr(Task, "build_hf_segformer", lambda self: _without_statistics(build(self)))
    right = build(task)
    monkeypatch.setattr(Task, "build_transformers", lambda self: right)
    with pytest.raises(DisagreementError, match="hf_segformer differs"):
        measure(task, rounds=1, load=Others(0), memory_of=())


def test_a_training_step_is_timed_with_gradients_on_every_parameter(tiny_config):
    task = Task(tiny_config(), 2, 64, 96, is_training=True)
    found = measure(task, rounds=1, load=Others(0), memory_of=())
    assert found[1].difference < 1e-4
    model = task.build_hf_segformer()
    assert run_model(model, task)().requires_grad is False
    assert all(parameter.grad is not None for parameter in model.parameters())


def _without_statistics(model):
    model.decode_head.batch_norm.reset_running_stats()
    return model


def test_gradients_agree_and_a_wrong_one_is_noticed(tiny_config, monkeypatch):
    task = Task(tiny_config(), 2, 64, 96, is_training=True)
    assert gradient_difference(task) < 1e-4
    right = Task.build_hf_segformer

    def wrong(self):
        model = right(self)
        model.segformer.encoder.block[0][0].mlp.dense1.weight.register_hook(lambda gradient: 1.5 * gradient)
        return model

    monkeypatch.setattr(Task, "build_hf_segformer", wrong)
    assert gradient_difference(task) > 1e-3


# --- Records ----------------------------------------------------------------------------------------------------------


def record_of(row="b0", candidate="hf_segformer", milliseconds=50.0, **others):
    timing = Timing((milliseconds / 1000,) * 3, 1, others.pop("quiet", True))
    return Record.of(row, candidate, timing, **others)


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "inference.csv"
    written = [
        record_of(memory=3 * MEBIBYTE, difference=1.5e-7, first_call=2.5, gigaflop=8.4, quiet=None),
        Record("b0", "missing", note='none, "here"'),
    ]
    replace_row(path, written)
    assert read_records(path) == written
    assert written[0].commit
    assert written[0].torch == torch.__version__


def test_a_row_is_replaced_as_a_whole_and_in_its_place(tmp_path):
    path = tmp_path / "inference.csv"
    replace_row(path, [record_of("b0"), record_of("b0", "transformers")])
    replace_row(path, [record_of("b2")])
    replace_row(path, [record_of("b0", milliseconds=7.0)])
    assert [(each.row, each.milliseconds) for each in read_records(path)] == [("b0", 7.0), ("b2", 50.0)]


@pytest.mark.parametrize("worse", [{"quiet": False}, None])
def test_a_good_row_is_not_replaced_by_a_worse_one(tmp_path, worse):
    path = tmp_path / "inference.csv"
    replace_row(path, [record_of()])
    before = path.read_text()
    with pytest.raises(ValueError, match="old numbers"):
        replace_row(path, [Record("b0", "hf_segformer", note="none") if worse is None else record_of(**worse)])
    assert path.read_text() == before
    replace_row(path, [record_of(milliseconds=7.0)])
    assert path.read_text() != before


def test_a_failing_row_keeps_the_old_one_and_other_rows_continue(tmp_path, capsys):
    def fail(options):
        raise DisagreementError("they differ")

    rows = {"b0": fail, "b2": lambda options: [record_of("b2", milliseconds=options.rounds)]}
    path = file_of(tmp_path, "inference", "cpu")
    replace_row(path, [record_of("b0")])
    assert main("inference", rows, "", ["--results", str(tmp_path), "--rounds", "3"]) == 1
    assert [(each.row, each.milliseconds) for each in read_records(path)] == [
        ("b0", 50.0),
        ("b2", 3.0),
    ]
    assert capsys.readouterr().err == "inference b0: they differ\n"


def test_each_processor_and_each_card_has_a_folder_of_its_own(tmp_path, monkeypatch):
    facts = {"processor": "AMD EPYC (Zen 5)", "instructions": "AVX-512", "cores": 2}
    monkeypatch.setattr(records, "machine", lambda: facts)
    assert file_of(tmp_path, "inference", "cpu") == tmp_path / "amd-epyc-zen-5-avx-512-2-cores" / "inference.csv"
    monkeypatch.setitem(facts, "instructions", "AVX2")
    assert file_of(tmp_path, "inference", "cpu") == tmp_path / "amd-epyc-zen-5-avx2-2-cores" / "inference.csv"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert file_of(tmp_path, "inference", "cuda:0") == tmp_path / "nvidia-h100-80gb-hbm3" / "inference.csv"


@pytest.mark.parametrize(("can_more", "name"), [(False, "AVX2"), (True, "AVX2 limited")])
def test_instructions_that_the_environment_limits_are_called_so(monkeypatch, can_more, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(machine_module, "_has_avx512", lambda: can_more)
    for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(variable, raising=False)
    assert instructions() == "AVX2"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    if can_more:
        with pytest.raises(ValueError, match="but not MKL_ENABLE_INSTRUCTIONS: set all three, or none"):
            instructions()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert instructions() == name
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert instructions() == "AVX-512"


def test_a_cards_record_names_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    record = record_of(device="cuda:0")
    assert (record.processor, record.instructions) == ("NVIDIA H100 80GB HBM3", "CUDA")
    assert record_of().processor == machine()["processor"]


def test_an_unknown_device_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_of:
        main("inference", {}, "", ["--device", "nowhere"])
    assert exit_of.value.code == 2
    assert "--device is 'nowhere', which PyTorch cannot use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "expected"),
    [
        ("AuthenticAMD", 25, 1, "AMD EPYC", "AMD EPYC (Zen 3)"),
        ("AuthenticAMD", 25, 17, "AMD EPYC", "AMD EPYC (Zen 4)"),
        ("AuthenticAMD", 25, 97, "AMD Ryzen 9 7950X", "AMD Ryzen 9 7950X (Zen 4)"),
        ("AuthenticAMD", 26, 2, "AMD EPYC", "AMD EPYC (Zen 5)"),
        ("AuthenticAMD", 23, 49, "AMD EPYC", "AMD EPYC"),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8481C", "Intel(R) Xeon(R) Platinum 8481C"),
    ],
)
def test_a_processors_name_has_amds_generation(vendor, family, model, name, expected):
    block = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
    assert processor_of_cpuinfo(f"{block}\nprocessor\t: 1\nmodel name\t: another\n") == expected


def test_a_system_without_a_model_name_has_no_processor():
    assert processor_of_cpuinfo("processor\t: 0\nBogoMIPS\t: 50.00\n") == ""


def test_rows_of_this_commit_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(all_rows, "RESULTS", tmp_path)
    path = file_of(tmp_path, "inference", "cpu")
    assert not all_rows.is_measured("inference", "b0")
    replace_row(path, [record_of("b0", quiet=False)])
    assert not all_rows.is_measured("inference", "b0")
    replace_row(path, [record_of("b0")])
    assert all_rows.is_measured("inference", "b0")
    monkeypatch.setattr(all_rows, "machine", lambda: {"commit": "another"})
    assert not all_rows.is_measured("inference", "b0")


# --- The page ---------------------------------------------------------------------------------------------------------


def row_of(**milliseconds):
    return {name: record_of(candidate=name, milliseconds=value) for name, value in milliseconds.items()}


def comparison_of(ours, others):
    return Comparison("", "inference", "b0", ours, others)


def test_speed_compares_the_fastest_on_either_side():
    results = {"inference": {"b0": row_of(mine=10.0, also_mine=8.0, other=40.0, another=24.0)}}
    assert comparison_of(("mine", "also_mine"), ("other", "another")).speed(results) == 3
    assert comparison_of(("mine",), ("absent",)).speed(results) is None
    assert comparison_of(("mine",), ("other",)).speed({}) is None


def test_memory_is_a_share_and_its_goal_an_upper_bound():
    row = {name: record_of(candidate=name, memory=size * MEBIBYTE) for name, size in (("a", 10), ("b", 40))}
    assert comparison_of(("a",), ("b",)).memory({"inference": {"b0": row}}) == 0.25
    goal = Goal("b0", 0.25, memory)
    assert goal.is_reached(0.25)
    assert not goal.is_reached(0.26)
    assert Goal("b0", 6).is_reached(6)
    assert not Goal("b0", 6).is_reached(5.99)


def test_the_share_of_the_peak_is_one_of_rates():
    row = {
        "eager": record_of(candidate="eager", milliseconds=20.0, gigaflop=8.0),
        "compiled": record_of(candidate="compiled", milliseconds=10.0, gigaflop=8.0),
        "matrix product": record_of(candidate="matrix product", milliseconds=10.0, gigaflop=16.0),
    }
    assert comparison_of(("eager", "compiled"), ()).share_of_peak({"inference": {"b0": row}}) == 0.5


def test_every_comparison_has_a_row_that_measures_it():
    for comparison in COMPARISONS.values():
        assert comparison.row in SCRIPTS[comparison.script], comparison
    assert {goal.name for goal in GOALS} <= COMPARISONS.keys()


WIDE, NARROW = ({"processor": "P", "instructions": each, "cores": 2} for each in ("AVX-512", "AVX2"))


def test_the_page_shows_processors_side_by_side_and_the_goals_show_missing_rows(tmp_path):
    pytest.importorskip("matplotlib")
    for row, ours in (("b0", 50.0), ("b2", 200.0)):
        rows = [record_of(row, "transformers", 400.0, **WIDE), record_of(row, "hf_segformer", ours, **WIDE)]
        replace_row(tmp_path / "wide" / "inference.csv", rows)
    missing = Record("b0_bfloat16", "hf_segformer bfloat16", note="no AMX", **WIDE)
    replace_row(tmp_path / "wide" / "inference.csv", [missing])
    rows = [record_of("b0", "transformers", 400.0, **NARROW), record_of("b0", "hf_segformer", 100.0, **NARROW)]
    replace_row(tmp_path / "narrow" / "inference.csv", rows)
    write_page(tmp_path / "page.md", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "| times as fast | P, AVX2, 2 cores | P, AVX-512, 2 cores |" in page
    assert "| B0, 1x3x512x512 | 4.00x | 8.00x |" in page
    assert "| B2, 1x3x512x512 |  | 2.00x |" in page
    assert "| B0, 1x3x512x512 | 50.0 | 400.0 | 8.00x |  |" in page
    assert page.index("\n## P, AVX2, 2 cores\n") < page.index("\n## P, AVX-512, 2 cores\n")
    assert "B5" not in page
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_goals_depend_on_the_instruction_set_and_missing_rows_are_shown():
    def results_of(facts, **milliseconds):
        return {
            "inference": {
                row: {
                    name: record_of(row, name, value, **facts)
                    for name, value in (("transformers", 400.0), ("hf_segformer", ours))
                }
                for row, ours in milliseconds.items()
            }
            | {"b0_bfloat16": {"hf_segformer bfloat16": Record("b0_bfloat16", "", note="no AMX", **facts)}}
        }

    commit = machine()["commit"]
    wide = goal_table(results_of(WIDE, b0=100.0, b2=50.0))
    assert f"| B0, 1x3x512x512 | 4.50x | 4.00x | **not reached** | `{commit}` |" in wide
    assert f"| B2, 1x3x512x512 | 8.00x | 8.00x | reached | `{commit}` |" in wide
    assert "| B5, 1x3x512x512 | 4.20x |  | not measured |  |" in wide
    assert "| B0, bfloat16 autocast, against float32 | 1.80x |  | no AMX |  |" in wide
    narrow = goal_table(results_of(NARROW, b0=100.0))
    assert f"| B0, 1x3x512x512 | 3.50x | 4.00x | reached | `{commit}` |" in narrow


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "matrix products"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::native_layer_norm", "LayerNorm, BatchNorm"),
        ("aten::gelu_backward", "GELU, softmax, exponentials"),
        ("aten::add_", "sums, products, maxima"),
        ("aten::copy_", profile.MOVING),
    ],
)
def test_operations_are_counted_by_what_they_do(operation, kind):
    assert profile.kind_of(operation) == kind


@pytest.mark.parametrize("is_training", [False, True])
def test_the_profile_finds_a_networks_parts_and_leaves_the_threads_as_they_were(tiny_config, is_training):
    torch.set_num_threads(2)
    found = profile.measure_shares("tiny", Task(tiny_config(), 1, 40, 72, is_training))
    assert torch.get_num_threads() == 2
    kinds = {each.candidate: each.milliseconds for each in found}
    assert min(kinds[kind] for kind in ("matrix products", "convolutions", "LayerNorm, BatchNorm")) > 0
    assert found[-1].candidate == profile.OUTSIDE


def test_the_page_shows_shares_of_the_time():
    rows = {"b0": {kind: Record("b0", kind, milliseconds=number) for kind, number in (("one", 30.0), ("two", 10.0))}}
    lines = report.profile_table(rows).splitlines()[2:]
    assert lines == ["| one | 75% |", "| two | 25% |", "| together, one thread | 40 ms |"]


def test_without_measurements_there_is_no_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 1
    assert "make bench" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_options_limit_the_rounds_of_a_row_and_never_add_any():
    assert Options(rounds=11).turns(5)["rounds"] == 5
    assert Options(rounds=2).turns(5)["rounds"] == 2


# --- segformer bench --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr("hf_segformer.benchmarking.timing.OtherLoad", lambda: Others(0.0))
    arguments = ["--size", "32x32", "--no-compile", "--repeats", "1", "--threads", "1", "--num-labels", "5"]
    assert segformer(["bench", "b0", *arguments]) == 0
    title, header, theirs, ours, *_ = capsys.readouterr().out.splitlines()
    assert title == "5 labels, batch of 1, cpu, 1 threads, inference, medians of 1"
    assert header.split() == [
        "size",
        "latency",
        "images/s",
        "peak",
        "memory",
        "times",
        "as",
        "fast",
        "of",
        "the",
        "memory",
    ]
    assert theirs.split()[:2] == ["32x32", "transformers"]
    assert ours.split()[:2] == ["32x32", "hf_segformer"]


def test_a_table_has_a_line_for_each_candidate_and_size():
    config = SegFormerConfig.from_variant("b0", num_labels=5)
    measurements = [
        Measurement("transformers", Timing((0.4,), 0, True), 100 * MEBIBYTE),
        Measurement("hf_segformer", Timing((0.1,), 0, False), 25 * MEBIBYTE, 0.0),
        Measurement("unknown", Timing((0.2,), 0, True)),
    ]
    tasks = [Task(config, 2, 64, 96, True), Task(config, 2, 128, 96, True)]
    text = format_measurements([(task, measurements) for task in tasks])
    title, _, *lines, note = text.splitlines()
    assert "training step" in title
    assert " ".join(lines[1].split()) == "64x96 hf_segformer 100.0 ms 20.00 25 MiB 4.00 0.25"
    assert " ".join(lines[2].split()) == "64x96 unknown 200.0 ms 10.00 not known 2.00 not known"
    assert lines[4].startswith("128x96")
    assert len(lines) == 6
    assert "Other processes" in note


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["b9"], ["b9"]),
        (["b0", "--device", "abacus"], ["abacus"]),
    ],
)
def test_bench_errors_are_one_line(arguments, words, capsys):
    assert segformer(["bench", *arguments]) == 1
    assert_one_line(capsys.readouterr().err, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "512"], ["512", "HEIGHTxWIDTH"]),
        (["--size", "16x64"], ["16x64", "32"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--threads", "-1"], ["--threads", "-1"]),
        (["--repeats", "0"], ["--repeats"]),
    ],
)
def test_wrong_usage_of_bench_exits_with_2(arguments, words, capsys):
    assert_usage_error(["bench", "b0", *arguments], capsys, *words)
