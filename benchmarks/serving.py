"""examples/serve.py under load: latency of one, two and four clients, and memory of the server's process.

Each client sends the drawn street as a JPEG file over one connection, waits for the segmentation map, and sends it
again. Latency is what a client waits: upload, decoding, network, PNG, download. The server and its clients share the
machine. Memory is the peak of the server's process so far, interpreter, PyTorch and weights included. The model is the
one trained on CamVid. The table in docs/guides/serving.md is written, too.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_segformer import SegFormerPredictor
from hf_segformer.benchmarking.timing import QUIET, OtherLoad, Timing

from .machine import ROOT
from .record import RESULTS, Options, Record, file_of, main, read_records

GUIDE = ROOT / "docs" / "guides" / "serving.md"
MARKS = ("<!-- measured by python -m benchmarks.serving -->", "<!-- end of what was measured -->")
MODEL, IMAGE = ROOT / "docs" / "results" / "camvid_b0", ROOT / "docs" / "images" / "street.png"
CLIENTS = {"one client": 1, "two clients": 2, "four clients": 4}
_REQUESTS = 8  # of each client in a round
_START = 300  # seconds until a server answers


class ServerLoad(OtherLoad):
    """Share of the machine that processes other than this one and the server use."""

    def __init__(self, pid: int):
        self.pid = pid
        super().__init__()

    def start(self) -> None:
        """Start an interval."""
        super().start()
        self.server = processor_seconds(self.pid)

    def share(self) -> float | None:
        """Return the share of all cores' time since `start`, 0 to 1; None where the system does not say."""
        share = super().share()
        if share is None:
            return None
        cores = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        return max(0.0, share - (processor_seconds(self.pid) - self.server) / cores)


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process in seconds (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid: int) -> int:
    """Return the bytes that a process has held at most (Linux)."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@contextmanager
def running_server(model: Path, device: str, num_threads: int) -> Iterator[tuple[int, int]]:
    """Run the example on a model; gives process and port.

    Raises:
        RuntimeError: if it ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, str(ROOT / "examples" / "serve.py"), str(model), "--port", str(port), "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(program, env=environment)
    try:
        end = time.monotonic() + _START
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server on {model} does not answer")
            time.sleep(0.2)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def send(port: int, body: bytes, num_requests: int) -> tuple[list[float], bytes]:
    """Send the same image over one connection; gives the seconds of each request, and the last answer."""
    seconds, answer = [], b""
    with closing(HTTPConnection("127.0.0.1", port, timeout=_START)) as connection:
        for _ in range(num_requests):
            began = time.perf_counter()
            connection.request("POST", "/predict", body)
            response = connection.getresponse()
            answer = response.read()
            seconds.append(time.perf_counter() - began)
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {answer[:200]!r}")
    return seconds, answer


def measure_clients(
    port: int, body: bytes, num_clients: int, load: ServerLoad, options: Options
) -> tuple[Timing, float]:
    """Latencies of clients that send at the same time, and images a second."""
    quiet: list[tuple[list[float], float]] = []
    disturbed: list[tuple[list[float], float]] = []
    end, share = time.monotonic() + options.budget, None
    with ThreadPoolExecutor(num_clients) as clients:
        while len(quiet) < options.rounds and (len(quiet) + len(disturbed) < options.rounds or time.monotonic() < end):
            load.start()
            began = time.perf_counter()
            answers = list(clients.map(lambda _: send(port, body, _REQUESTS)[0], range(num_clients)))
            rate = num_clients * _REQUESTS / (time.perf_counter() - began)
            share = load.share()
            (quiet if share is None or share <= QUIET else disturbed).append((list(chain(*answers)), rate))
    is_quiet = 2 * len(quiet) >= options.rounds
    counted = quiet if is_quiet else quiet + disturbed
    seconds = tuple(each for latencies, _ in counted for each in latencies)
    timing = Timing(seconds, len(disturbed) if is_quiet else 0, None if share is None else is_quiet)
    return timing, statistics.median(rate for _, rate in counted)


def measure_serving(options: Options, row: str, model: Path = MODEL) -> list[Record]:
    """One record for each number of clients, once the answer is the predictor's."""
    file = BytesIO()
    Image.open(IMAGE).convert("RGB").save(file, "JPEG", quality=92)
    with running_server(model, options.device, torch.get_num_threads()) as (pid, port):
        _, answer = send(port, file.getvalue(), 1)
        expected = SegFormerPredictor.from_pretrained(model, device=options.device)(Image.open(file)).segmentation
        difference = float(np.mean(np.asarray(Image.open(BytesIO(answer))) != expected))
        if difference > 1e-3:
            raise ValueError(f"{difference:.1%} of the pixels differ from the predictor's; expected at most 0.1 %")
        records = []
        for name, num_clients in CLIENTS.items():
            timing, rate = measure_clients(port, file.getvalue(), num_clients, ServerLoad(pid), options)
            slow = 1000 * float(np.quantile(timing.seconds, 0.95))
            note = f"95 % within {slow:.0f} ms, {rate:.1f} images a second"
            records.append(Record.of(row, name, timing, peak_of(pid), difference=difference, note=note))
    return records


ROWS = {"b0_camvid": partial(measure_serving, row="b0_camvid")}


def guide_text(records: Sequence[Record]) -> str:
    """Return the table of docs/guides/serving.md, with the machine and whether it was quiet."""
    first = records[0]
    lines = ["| clients at a time | median | fastest, slowest | memory | |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.candidate.split()[0]} | {each.milliseconds:,.0f} ms | {each.fastest:,.0f}, {each.slowest:,.0f} ms | "
        f"{each.mebibytes:,.0f} MiB | {each.note} |"
        for each in records
    ]
    load = (
        "Other processes left the machine alone."
        if _is_quiet(records)
        else ("**Other processes used the machine meanwhile: these times say little.** Measure your own.")
    )
    place = f"{first.processor}, {first.instructions}, {first.cores} cores, {first.threads} threads, {first.date}"
    return "\n".join([*lines, "", f"{place}. {load}"])


def _is_quiet(records: Sequence[Record]) -> bool:
    return all(each.quiet is not False for each in records)


def write_guide(records: Sequence[Record], page: Path = GUIDE) -> None:
    """Put the records into the guide, between its two marks."""
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{guide_text(records)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    status = main("serving", ROWS, __doc__)
    if file_of(RESULTS, "serving", "cpu").exists():
        write_guide(read_records(file_of(RESULTS, "serving", "cpu")))
    sys.exit(status)
