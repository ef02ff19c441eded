"""The measurement of examples/serve.py: its own server counts as no disturbance, and every client's requests count."""

import os

import pytest

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from tests.support.tiny import TINY

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from benchmarks import serving
from benchmarks.record import RESULTS, Options, Record, read_records


def test_processor_time_of_a_process_is_the_systems():
    before = sum(os.times()[:2])
    assert before - 0.1 <= serving.processor_seconds(os.getpid()) <= sum(os.times()[:2]) + 0.1
    assert serving.peak_of(os.getpid()) > 50 * 2**20


def test_the_servers_own_time_is_not_other_load(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    times = {"busy": 100.0, "server": 40.0, "clock": 0.0, "own": 5.0}
    monkeypatch.setattr("hf_segformer.benchmarking.timing._busy_seconds", lambda: times["busy"])
    monkeypatch.setattr(serving, "processor_seconds", lambda pid: times["server"])
    monkeypatch.setattr("time.perf_counter", lambda: times["clock"])
    monkeypatch.setattr("time.process_time", lambda: times["own"])
    load = serving.ServerLoad(1)
    times.update(busy=117.03, server=52.0, clock=10.0, own=7.0)  # 17 s busy: 12 of the server, 2 of this process
    assert load.share() == pytest.approx(3 / 20)


def record(candidate, quiet):
    facts = {"processor": "P", "instructions": "AVX2", "cores": 2, "threads": 2, "date": "2026-01-02"}
    times = {"milliseconds": 1234.5, "fastest": 90.0, "slowest": 2000.0, "mebibytes": 700.4}
    return Record("b0_camvid", candidate, quiet=quiet, note="8.1 images a second", **times, **facts)


@pytest.mark.parametrize(("quiet", "words"), [(True, "left the machine alone"), (False, "these times say little")])
def test_the_guide_holds_the_figures_between_its_marks(quiet, words, tmp_path):
    page = tmp_path / "guide.md"
    page.write_text(f"before\n{serving.MARKS[0]}\nold\n{serving.MARKS[1]}\nafter\n")
    for _ in range(2):
        serving.write_guide([record("one client", quiet), record("two clients", True)], page)
    text = page.read_text()
    assert text.startswith(f"before\n{serving.MARKS[0]}\n| clients")
    assert text.endswith(f"{serving.MARKS[1]}\nafter\n")
    assert "old" not in text
    assert "| two | 1,234 ms | 90, 2,000 ms | 700 MiB | 8.1 images a second |" in text
    assert "P, AVX2, 2 cores, 2 threads, 2026-01-02" in text
    assert words in text


def test_the_figures_of_the_guide_are_those_of_a_results_file():
    guide = serving.GUIDE.read_text()
    shown = guide.partition(serving.MARKS[0])[2].partition(serving.MARKS[1])[0].strip()
    files = sorted(RESULTS.glob("*/serving.csv"))
    assert shown in [serving.guide_text(read_records(file)) for file in files]


@pytest.mark.slow
def test_records_of_one_two_and_four_clients(tmp_path):
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5)).eval()
    model.save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    records = serving.measure_serving(Options(rounds=1, budget=0), "tiny", tmp_path)
    assert [(each.row, each.candidate) for each in records] == [("tiny", name) for name in serving.CLIENTS]
    assert [each.samples for each in records] == [8, 16, 32]
    for each in records:
        assert 0 < each.fastest <= each.milliseconds <= each.slowest
        assert each.mebibytes > 100
        assert each.difference <= 1e-3
        assert "images a second" in each.note
    assert records[0].mebibytes <= records[1].mebibytes <= records[2].mebibytes
