"""pytest-benchmark shows the peers of a case side by side; the samples are those that `compare` took in turns.

A fixture of pytest-benchmark times one function after the other, so that a slow minute of the machine falls on one of
them. Here the first test of a case measures all its selected peers in turns, and each test hands its peer's samples
over: the benchmark's clock replays them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.compare import Effort, Result, side_by_side
from benchmarks.floors import TINY
from benchmarks.peers import all_peers
from benchmarks.plan import cases, rehearsal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ReplayedClock:
    """Two readings per round, as far apart as the sample was long."""

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._readings = [reading for sample in reversed(seconds) for reading in (sample, 0.0)]

    def __call__(self) -> float:
        return self._readings.pop()


CLOCK = ReplayedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpop benchmarks")
    group.addoption("--records", type=Path, help="append a JSON line per measurement to this file")
    group.addoption("--rehearse", action="store_true", help="tiny sizes, seconds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the arguments `case` and `peer` runs for every case of its level and every peer that offers it."""
    if "case" not in metafunc.fixturenames:
        return
    level = metafunc.function.__name__.removeprefix("test_")
    planned = rehearsal(DEVICE) if metafunc.config.getoption("rehearse") else cases(DEVICE)
    parameters = [
        pytest.param(case, peer.name, id=f"{case.task}-{case.size_name}-{peer.name.replace(' ', '_')}")
        for case in planned
        for peer in all_peers().values()
        if case.level == level and case.takes(peer)
    ]
    metafunc.parametrize(("case", "peer"), parameters)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # a library's warning is not its failure


class Comparisons:
    """The results of the case at hand; of the last one only, so that its tensors are freed."""

    def __init__(self, config: pytest.Config) -> None:
        rehearse = config.getoption("rehearse")
        self.path: Path | None = config.getoption("records")
        self.effort = Effort(rounds=2, seconds=0.0, probe=TINY) if rehearse else Effort()
        self.environment = records.environment(DEVICE)
        self._case: Case | None = None
        self._results: dict[str, Result] = {}

    def result(self, case: Case, peer: str, selected: set[str]) -> Result:
        if case is not self._case:
            peers = {name: each for name, each in all_peers().items() if name in selected}
            self._results, self._case = side_by_side(case, peers, self.effort), case
            for result in self._results.values():
                if self.path is not None:
                    records.append(self.path, result.record | self.environment)
            vars(case).pop("inputs", None)  # the next case needs the memory
        return self._results[peer]


@pytest.fixture(scope="session")
def comparisons(request: pytest.FixtureRequest) -> Comparisons:
    return Comparisons(request.config)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, comparisons: Comparisons) -> Any:
    """compare(case, peer): the peer's samples as this test's benchmark; a wrong result fails, an absent peer skips."""

    def run(case: Case, peer: str) -> None:
        parameters = [getattr(item, "callspec", None) for item in request.session.items]
        selected = {each.params["peer"] for each in parameters if each and each.params.get("case") is case}
        result = comparisons.result(case, peer, selected)
        record = result.record
        benchmark.group = str(case)
        keys = ("peer_version", "errors", "peak_bytes", "of_floor", "skipped", "refused", "failed")
        benchmark.extra_info.update({key: record[key] for key in keys if key in record})
        if "skipped" in record or record.get("failed") == "out of memory":
            pytest.skip(str(result.trouble))
        if result.trouble:
            pytest.fail(f"{result.trouble}, errors {record.get('errors')}", pytrace=False)
        CLOCK.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds))

    return run
