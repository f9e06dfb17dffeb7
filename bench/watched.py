"""Pytest plugin of `make gpu-check`: a test that hangs, or that breaks the device's context, costs itself alone.

Reasons are printed as they come, for a run may be cut off. A test that hangs ends the process, and so does one after
which the device answers no more (an illegal access poisons every later call); started again with the same journal, it
takes the rest (bench/journal.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import journal


def pytest_configure(config: pytest.Config) -> None:
    journal.watch()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if journal.journal is None:
        return
    behind = journal.journal.done | set(journal.journal.lost)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in behind])
    items[:] = [item for item in items if item.nodeid not in behind]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with journal.doing(item.nodeid):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.failed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash else str(report.longrepr)
    journal.say(f"\nREASON {report.nodeid} {report.when}: {' '.join(reason.split())[:400]}")
    journal.leave_broken(report.nodeid)
