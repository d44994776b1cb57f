"""Each test of this folder runs in a container, where systemd is PID 1.

Out here a test is asked for and its reports are what comes back; one container serves all tests of
a process. In there the same folder is collected, and a test is run when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .container import INSIDE, Container, serve, why_not
from .service import Service, journal

_HERE = Path(__file__).parent
_container: Container | None = None

if INSIDE in os.environ:

    def pytest_runtestloop(session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        reports: list[Any] = []

        class Collector:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                to_data = session.config.hook.pytest_report_to_serializable
                reports.append(to_data(config=session.config, report=report))

        def run(nodeid: str, following: str | None) -> list[Any]:
            reports.clear()
            item, nextitem = items[nodeid], following and items[following]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            return reports

        session.config.pluginmanager.register(Collector())
        serve(run)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport() -> Iterator[None]:
        report = yield
        if report.failed:
            report.sections.append(("journal", journal("fdshare*", 60)))
        return report

else:

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        ours = [item for item in items if item.path.parent == _HERE]
        if ours and (reason := why_not()):
            for item in ours:
                item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.path.parent != _HERE or item.get_closest_marker("skip"):
            return None
        # What comes next says which fixtures stay.
        stays = nextitem is not None and nextitem.path.parent == _HERE
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in _run(item, nextitem.nodeid if nextitem and stays else None):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(item: pytest.Item, following: str | None) -> list[pytest.TestReport]:
        global _container
        try:
            _container = _container or Container()
            found = _container.run(item.nodeid, following)
        except OSError as error:
            if _container is not None:
                _container.close()
                _container = None
            return [
                pytest.TestReport(
                    item.nodeid, item.location, {}, "failed", f"{error}", "setup", start=0, stop=0
                )
            ]
        for data in found:
            if isinstance(data["longrepr"], list):  # of a skip: JSON has no tuples
                data["longrepr"] = tuple(data["longrepr"])
        read = item.config.hook.pytest_report_from_serializable
        return [read(config=item.config, data=data) for data in found]

    def pytest_sessionfinish() -> None:
        if _container is not None:
            _container.close()


@pytest.fixture(scope="module")
def lasting_service() -> Iterator[Service]:
    """As `service`, one for all tests of a module."""
    service = Service()
    yield service
    service.remove()


@pytest.fixture
def service() -> Iterator[Service]:
    """fdshare.service as it is shipped, fresh. A test that fails shows its log."""
    service = Service()
    yield service
    print(service.log())
    service.remove()
