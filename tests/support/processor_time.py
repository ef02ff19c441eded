"""Report processor time per test: `pytest -p tests.support.processor_time`.

Processor time is user + system, of the test and of the processes that it waited for. Unlike wall-clock time it hardly
depends on what else the machine does, so the budget of `make test` is stated in it.
"""

import os
from collections import Counter

import pytest

LONGEST = 40


def _processor_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Attach the processor time since the previous report: set-up, call or tear-down."""
    report = yield
    now = _processor_seconds()
    report.processor_seconds = now - getattr(item.session, "processor_seconds", now)
    item.session.processor_seconds = now
    return report


def pytest_terminal_summary(terminalreporter):
    """Print the total, and the files and tests that take most of it."""
    tests, files = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            seconds = getattr(report, "processor_seconds", 0.0)
            tests[getattr(report, "nodeid", "")] += seconds
            files[getattr(report, "nodeid", "").partition("::")[0]] += seconds
    terminalreporter.section(f"processor time: {tests.total():.0f} s")
    for counted in (files, tests):
        for name, seconds in counted.most_common(LONGEST):
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
