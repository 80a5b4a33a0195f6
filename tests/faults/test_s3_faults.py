"""Faults of an S3 store, injected by a proxy in front of a real S3 server.

Claim: with any fault in any request, an operation returns the correct result, or fails with an
error that a retry may solve (exit code 1). Repeated without faults, it returns the correct result.
Damaged content is never returned, and one damaged response is not reported as damage in the store.
A conditional create is executed exactly once, even if its response is lost.

Enumeration: a run without faults counts the requests of an operation. Then there is one run per
request and kind of fault, with the fault once and three times in a row (the number of tries of the
client). Then faults occur, with fixed seeds, in 5 to 30 % of all requests of operations and in 2
to 15 % of all requests of complete orders.

A fault is ``500`` or ``503`` (an error response), ``slow``, ``reset`` (before the request arrives),
``truncated``, ``lost`` (executed, but without a response) or ``flipped`` (one bit of the response).
A home is the folder with everything that recpress stores (``RECPRESS_HOME``), a snapshot is a copy
of a home, and a draft is the folder of a bundle before it is packed. The ledger is the list of a
model's promotions and rollbacks in the store.
"""

import random
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import ForkServerClient
from homes import Home, read_state
from outcomes import CountOutcome
from s3_proxy import FAULTS, Proxy, fail_at, fail_randomly, running_proxy
from s3_server import S3Server

from infra.errors import AlreadyThere, ArtifactDamaged, InfraError, RecordRefused, Refused
from infra.registry.ledger import Ledger
from infra.store.manifest import CHUNK_BYTES
from infra.store.object_store import Store
from infra.store.records import read_record, seal_record

SUITE = "S3"
ORDER_DIGEST = "0" * 64  # of an order that does not exist: the ledger does not read it
IN_A_ROW = 3  # attempts of the client for one request
RATES = (0.05, 0.15, 0.3)  # shares of the requests with a fault
SEEDS_PER_RATE = 25
WRITERS = 6  # threads that append to one ledger
APPENDS = 40 // WRITERS  # per writer
ORDER_SEEDS = (1, 2, 3, 4)
ORDER_RATES = (0.02, 0.05, 0.1, 0.15)  # one for each seed
ATTEMPTS = 12  # runs of a command of an order; the last one has no faults


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy without faults; the environment of the test uses it as the S3 endpoint."""
    with running_proxy(s3_server.endpoint) as running:
        for name, value in (s3_server.environment | {"AWS_ENDPOINT_URL": running.url}).items():
            monkeypatch.setenv(name, value)
        yield running


class Operation:
    """Prepares, runs and checks one operation on a store; each repetition has a new key.

    Args:
        name: an entry of ``OPERATIONS``.
        folder: folder for the files of the operation.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder, self._number = name, folder, 0
        self.store = Store("s3://models/faults")
        self._rng = random.Random(name)

    def prepare(self) -> None:
        """Create the inputs of the operation, without faults."""
        self._number += 1
        self.key = f"{secrets.token_hex(8)}/{self._number}"
        self.body = self._rng.randbytes(2000)
        self._source = self._folder / "source"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._source.mkdir(parents=True)
        large = self.name == "put a large artifact"
        size = CHUNK_BYTES + 1_000_000 if large else 20_000
        (self._source / "weights").write_bytes(self._rng.randbytes(size))
        (self._source / "notes").write_bytes(self.body)
        if self.name == "get an artifact":
            self._artifact = self.store.put(self._source)
        if self.name == "read a record":
            self.store.create(f"{self.key}/record", seal_record({"text": self.body.hex()}))
        if self.name == "append to a ledger":
            self._ledger = Ledger(self.store, self.key.replace("/", "-"))
            self._ledger.append("1", ORDER_DIGEST, "promote", by="me", reason="before")

    def run(self) -> Any:
        """Run the operation, with faults."""
        if self.name.startswith("put "):
            return self.store.put(self._source)
        if self.name == "get an artifact":
            into = self._folder / "into"
            shutil.rmtree(into, ignore_errors=True)
            try:
                return contents(self.store.get(self._artifact, into))
            except (Refused, InfraError):
                assert not into.exists(), "a failed copy left something"
                raise
        if self.name == "read a record":
            fields, is_verified = read_record(self.store, f"{self.key}/record")
            if not is_verified:
                # Callers of ``read_record`` raise an error for such a record.
                raise ArtifactDamaged("manifest_changed", uri=self.key)
            return fields
        if self.name == "create a record":
            return self.store.create(self.key, self.body)
        # With ``expected=1``, the entry is appended only if the ledger has one entry.
        return self._ledger.append(
            "2", ORDER_DIGEST, "promote", by="me", reason="once", expected=1
        ).reason

    def expected(self) -> Any:
        """Return the result of the operation without faults."""
        return {
            "get an artifact": lambda: contents(self._source),
            "read a record": lambda: {"text": self.body.hex()},
            "create a record": lambda: None,
            "append to a ledger": lambda: "once",
        }.get(self.name, lambda: self.store.put(self._source))()

    def check(self) -> None:
        """Check the stored content afterwards, without faults."""
        if self.name.startswith("put "):
            into = self._folder / "check"
            self.store.get(self.store.put(self._source), into)
            assert contents(into) == contents(self._source)
        if self.name == "create a record":
            assert self.store.read(self.key) == self.body
        if self.name == "append to a ledger":
            assert [entry.reason for entry in self._ledger.entries()] == ["before", "once"]


OPERATIONS = (
    "put an artifact",
    "put a large artifact",
    "get an artifact",
    "read a record",
    "create a record",
    "append to a ledger",
)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder without subfolders, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def outcome_of(operation: Operation, fault: str, proxy: Proxy) -> str:
    """Run the operation with faults; return the outcome for the table.

    Args:
        operation: the prepared operation.
        fault: an item of ``FAULTS``, followed by ``once`` if only one request has it; ``flipped``
            if any fault can occur.
        proxy: the proxy with the schedule of the faults.

    Raises:
        AssertionError: the result is wrong, or the error is not an expected one.
    """
    try:
        result = operation.run()
    except AlreadyThere:
        # The first create was executed and its response lost; the client tried again.
        assert operation.name == "create a record"
        return "refused as already there"
    except (ArtifactDamaged, RecordRefused):
        assert "flipped" in fault, "only a changed byte is damage"
        assert fault != "flipped once", "one changed response is not damage in the store"
        return "refused as damaged"
    except InfraError:
        return "retryable error"
    proxy.set_schedule()  # compute the expected result without faults
    assert result == operation.expected()
    return "right result"


def repeat_and_check(proxy: Proxy, operation: Operation, outcome: str) -> None:
    """Repeat a failed operation without faults, and check the stored content."""
    proxy.set_schedule()
    if outcome in {"retryable error", "refused as damaged"}:
        try:
            assert operation.run() == operation.expected()
        except AlreadyThere:
            assert operation.name in {"create a record", "append to a ledger"}
    operation.check()


def check_every_request(
    proxy: Proxy,
    operation: Operation,
    repeated: int,
    count_outcome: CountOutcome,
    only_request: int | None = None,
) -> None:
    """Test each fault in each request of one operation, or only in request ``only_request``.

    The same fault also occurs in the next ``repeated - 1`` requests.
    """
    operation.prepare()
    proxy.set_schedule()
    operation.run()
    count = len(proxy.requests)
    assert count > 0
    failed = []
    for number in range(1, count + 1) if only_request is None else [only_request]:
        for fault in FAULTS:
            proxy.set_schedule()
            operation.prepare()
            proxy.set_schedule(fail_at(number, fault, repeated))
            try:
                outcome = outcome_of(operation, f"{fault} once" if repeated == 1 else fault, proxy)
                repeat_and_check(proxy, operation, outcome)
            except Exception as error:
                outcome = "wrong"
                failed.append(f"{fault} at request {number}: {type(error).__name__}: {error}")
            case = "once" if repeated == 1 else f"{repeated} times in a row"
            count_outcome(SUITE, f"{operation.name}, {case}", outcome)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", ["get an artifact", "create a record", "append to a ledger"])
def test_operation_with_a_fault_in_its_first_request_is_right_or_retryable(
    name: str, proxy: Proxy, tmp_path: Path, count_outcome: CountOutcome
) -> None:
    check_every_request(
        proxy,
        Operation(name, tmp_path / "work"),
        repeated=1,
        count_outcome=count_outcome,
        only_request=1,
    )


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("repeated", [1, IN_A_ROW])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_with_any_fault_in_any_request_is_right_or_retryable(
    name: str, repeated: int, proxy: Proxy, tmp_path: Path, count_outcome: CountOutcome
) -> None:
    check_every_request(proxy, Operation(name, tmp_path / "work"), repeated, count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["put an artifact", "get an artifact", "create a record"])
def test_operation_with_faults_in_a_share_of_all_requests_is_right_or_retryable(
    name: str, rate: float, proxy: Proxy, tmp_path: Path, count_outcome: CountOutcome
) -> None:
    operation = Operation(name, tmp_path / "work")
    failed = []
    for seed in range(SEEDS_PER_RATE):
        proxy.set_schedule()
        operation.prepare()
        proxy.set_schedule(fail_randomly(rate, FAULTS, seed))
        try:
            outcome = outcome_of(operation, "flipped", proxy)
            repeat_and_check(proxy, operation, outcome)
        except Exception as error:
            outcome = "wrong"
            failed.append(f"seed {seed}: {type(error).__name__}: {error}")
        count_outcome(SUITE, f"{name}, {rate:.0%} of requests", outcome)
    assert not failed, "\n".join(failed)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rate", RATES)
def test_writers_of_one_ledger_with_lost_responses_have_exactly_one_entry_for_each_append(
    rate: float, proxy: Proxy, count_outcome: CountOutcome
) -> None:
    model = f"race-{secrets.token_hex(8)}"
    confirmed: list[str] = []
    failed: list[str] = []
    proxy.set_schedule()

    def write(writer: int) -> None:
        ledger = Ledger(Store("s3://models/faults"), model)
        for number in range(APPENDS):
            name = f"{writer}-{number}"
            try:
                ledger.append("1", ORDER_DIGEST, "promote", by="me", reason=name)
                confirmed.append(name)
            except InfraError:
                failed.append(name)

    proxy.set_schedule(fail_randomly(rate, ("lost", "reset", "503"), seed=7))
    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.set_schedule()
    written = Counter(
        entry.reason for entry in Ledger(Store("s3://models/faults"), model).entries()
    )
    assert max(written.values()) == 1, "an entry was written twice"
    assert set(confirmed) <= set(written), "a confirmed entry was lost"
    assert len(confirmed) + len(failed) == WRITERS * APPENDS
    case = f"{WRITERS} writers of one ledger, {rate:.0%} lost responses"
    count_outcome(SUITE, case, "confirmed, written once", len(confirmed))
    count_outcome(SUITE, case, "retryable error, written at most once", len(failed))


class OrderOnS3:
    """Runs the commands of an order whose store is accessed through the proxy.

    Args:
        fork_server: fork server that runs the commands.
        home: home with the registry and temporary files.
        proxy: the proxy that injects faults.
        root: address of the store.
        variables: environment variables with credentials and the Prefect server.
    """

    def __init__(
        self,
        fork_server: ForkServerClient,
        home: Home,
        proxy: Proxy,
        root: str,
        variables: dict[str, str],
    ) -> None:
        self._fork_server, self._home, self._proxy = fork_server, home, proxy
        self._variables = variables | {"RECPRESS_STORE": root}
        self.codes: Counter[int] = Counter()

    def finish(self, *command: str, rate: float, seed: int) -> None:
        """Run a command until it exits with 0: with faults, in the last attempt without.

        The rate of faults decreases after every third attempt, so that the command finishes.
        """
        for attempt in range(ATTEMPTS):
            is_last = attempt == ATTEMPTS - 1
            self._proxy.set_schedule(
                fail_randomly(
                    0 if is_last else rate / (1 + attempt // 3), FAULTS, seed * 100 + attempt
                )
            )
            variables = self._home.variables | self._variables
            completed = self._fork_server.run(command, variables=variables)
            assert not completed.crashed, f"{command}: {completed.text}"
            allowed = {0, 1} if self._proxy.faults else {0}
            if "damaged" in completed.text:
                allowed |= {2}  # a flipped byte in a response is reported as damage
            assert completed.code in allowed, f"{command}: {completed.code} {completed.text}"
            self.codes[completed.code] += 1
            if completed.code == 0:
                return


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", ORDER_SEEDS)
def test_whole_order_on_a_faulty_store_has_the_bytes_of_an_order_without_faults(
    seed: int,
    preloaded_fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    order: Path,
    finished_snapshot: Path,
    order_variables: dict[str, str],
    proxy: Proxy,
    s3_server: S3Server,
    count_outcome: CountOutcome,
) -> None:
    home = Home(root / "home")
    home.restore(finished_snapshot)
    expected = read_state(home)
    home.restore(empty_snapshot)
    variables = order_variables | s3_server.environment | {"AWS_ENDPOINT_URL": proxy.url}
    address = f"s3://models/order{seed}"
    order_on_s3 = OrderOnS3(preloaded_fork_server, home, proxy, address, variables)
    rate = ORDER_RATES[ORDER_SEEDS.index(seed)]
    order_on_s3.finish("bundle", "pack", str(draft), rate=rate, seed=seed)
    order_on_s3.finish("compress", "--order", str(order), rate=rate, seed=seed)
    into = root / f"fetched{seed}"
    order_on_s3.finish("registry", "fetch", "clicks", "--into", str(into), rate=rate, seed=seed)
    proxy.set_schedule()
    result = read_state(home, Store(address))
    assert result == expected
    for code, number in order_on_s3.codes.items():
        names = {0: "finished", 1: "retryable error", 2: "refused as damaged"}
        count_outcome(SUITE, f"whole order, {rate:.0%} of requests", names[code], number)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
def test_pack_with_a_fault_in_any_request_is_right_or_exits_with_code_1(
    fault: Any,
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    proxy: Proxy,
    s3_server: S3Server,
    count_outcome: CountOutcome,
) -> None:
    home = Home(root / "home")
    home.restore(empty_snapshot)
    variables = home.variables | s3_server.environment | {"AWS_ENDPOINT_URL": proxy.url}
    command = ["bundle", "pack", str(draft), "--json"]

    def pack(number: int) -> Any:
        store_variable = {"RECPRESS_STORE": f"s3://models/pack-{fault}/{number}"}
        return fork_server.run(command, variables=variables | store_variable)

    proxy.set_schedule()
    reference = pack(0)
    assert reference.code == 0, reference.text
    failed = []
    for number in range(1, len(proxy.requests) + 1):
        proxy.set_schedule(fail_at(number, fault, IN_A_ROW))
        completed = pack(number)
        proxy.set_schedule()
        repeated = pack(number)
        is_right = (
            repeated.code == 0 and repeated.outputs == reference.outputs and not completed.crashed
        )
        allowed = {0, 1, 2} if fault == "flipped" and "damaged" in completed.text else {0, 1}
        outcome = {0: "right result", 1: "retryable error"}.get(
            completed.code, "refused as damaged"
        )
        if not is_right or completed.code not in allowed:
            outcome = "wrong"
            failed.append(
                f"request {number}: {completed.code} {completed.text[-400:]} {repeated.text[-400:]}"
            )
        count_outcome(SUITE, f"pack, {fault}", outcome)
    assert not failed, "\n".join(failed)
