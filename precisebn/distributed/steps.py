"""Steps: all ranks take one, or none does.

That is decided in the key-value store that every process group has, outside its collectives. A rank that fails says so
in the store, where a notice can meet nothing else; and a collective is entered only when every rank stands before it.
So a failure anywhere becomes an exception everywhere, never a hang, and the group stays fit for use.
"""

import base64
import json
import logging
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch.distributed as dist

from precisebn._warnings import warn
from precisebn.errors import InputError, RankFailedError, add_note

__all__ = ["Steps"]

_logger = logging.getLogger(__name__)

WAIT_WARNING_S = 30.0
"""A rank that has waited so long for others to begin says so."""

FAREWELL_S = 10.0
"""So long rank 0, whose process may keep the store, stays at the end until all others have read the last decision."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 2e-2
_PLAIN_TEXT, _LONGEST_TEXT = 2**14, 2**23 - 2**10  # beyond 8 MiB torch's TCPStore closes the connection

_CHECKS_A_SECOND = 20_000
"""What a store answers easily: the pauses of many ranks are longer, so that all of them together ask no more often."""


class Steps:
    """A row of steps, each of which all ranks take or none: decided in a key-value store, outside of collectives.

    For each step every rank puts its payload into the store and counts itself; the last to come makes of all payloads
    one result, and writes: go. A rank that fails, or has waited for too long, writes instead who failed and why. The
    first to write stands (``compare_set``), and that decision is what every rank reads. So a notice of failure comes
    before a step or after it, never into it: what fails while it waits and is told "go" takes the step with the others
    and fails before the next one.

    The n-th run of each rank belongs together: every rank counts its runs, in the store as well.

    Args:
        store: a ``torch.distributed.Store`` that all ranks share.
        rank: this one.
        size: how many there are.
        timeout_s: how long to wait for a rank.
        let_through: the context to wait in: an interrupt may come in it.
        call: what the others are to call, for messages.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        let_through: Callable[[], AbstractContextManager[Any]] = nullcontext,
        call: str,
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._timeout_s = timeout_s
        self._let_through = let_through
        self._alone = f"waiting for the other ranks to call {call}; process_group=False is for this rank alone"
        self._longest_pause_s = max(_LONGEST_PAUSE_S, size / _CHECKS_A_SECOND)
        self._step = 0
        self._late: BaseException | None = None
        """What was raised in a wait for a step that all ranks were taking already."""
        try:
            self._run: int = store.add(f"runs/{rank}", 1)
        except dist.DistError as error:
            raise self._store_lost() from error

    def take(self, payload: object, combine: Callable[[list[Any]], Any]) -> Any:
        """Wait until all ranks are here.

        Args:
            payload: what this rank brings, made of what JSON knows.
            combine: makes one result of the payloads of all ranks, in their order. Runs on one of them.

        Returns:
            The result, the same on all ranks.

        Raises:
            RankFailedError: a rank has failed, has not come in time, or the process has ended that keeps the store.
        """
        self._raise_late()
        try:
            decision = self._come(payload, combine)
        except dist.DistError as error:
            raise self._store_lost() from error
        except BaseException as error:
            # Unless all others have come in the meantime: then they go on, and this rank with them.
            decision = {}
            with suppress(dist.DistError):
                decision = self._decide(self._notice_of(error))
            if "go" not in decision:
                raise
            self._late = error
        if "go" not in decision:
            raise self._failure(decision)
        self._step += 1
        return decision["go"]

    def fail(self, error: BaseException) -> None:
        """Let the others know, at the next step that they come to, that this rank is about to raise."""
        _logger.info("rank %d of %d failed (%r); telling the others", self._rank, self._size, error)
        try:
            while "go" in self._decide(self._notice_of(error)):
                self._step += 1
        except Exception:  # the store is gone, and the others notice that; the failure itself matters more
            _logger.warning("rank %d could not tell the other ranks of its failure", self._rank)

    def leave(self) -> None:
        """After the last step: nothing that happens to another rank concerns this one any more.

        The process of rank 0 may keep the store, and may end now; so it stays until all have read the decision.
        """
        with suppress(dist.DistError):
            self._store.add(f"{self._run}/left", 1)
            deadline, pause = time.monotonic() + FAREWELL_S, _SHORTEST_PAUSE_S
            while self._rank == 0 and time.monotonic() < deadline:
                if self._store.add(f"{self._run}/left", 0) == self._size:
                    self._sweep(self._step - 1)
                    self._store.delete_key(f"{self._run}/left")
                    break
                time.sleep(pause)
                pause = min(2.0 * pause, _LONGEST_PAUSE_S)
        self._raise_late()

    def _come(self, payload: object, combine: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """Bring a payload to the step; the last to come decides, the others wait for that."""
        self._store.set(self._key(self._rank), _packed(payload))
        if self._store.add(self._key("here"), 1) < self._size:
            return self._wait()
        payloads = self._store.multi_get([self._key(rank) for rank in range(self._size)])
        decision = self._decide({"go": combine([_unpacked(text) for text in payloads])})
        if self._step > 0:  # whoever is here has read what was decided before
            self._sweep(self._step - 1)
        return decision

    def _wait(self) -> dict[str, Any]:
        """Wait for the decision, asking with pauses: a blocking wait would keep Ctrl-C and others from the store."""
        start, pause, quiet = time.monotonic(), _SHORTEST_PAUSE_S, self._step == 0
        while not self._store.check([self._key("decision")]):
            waited = time.monotonic() - start
            if waited > self._timeout_s and (missing := self._missing()):
                return self._decide({"missing": missing})
            if waited > self._timeout_s + FAREWELL_S:  # the last to come has ended while it decided
                return self._decide({"missing": list(range(self._size))})
            if quiet and waited > WAIT_WARNING_S:
                quiet = False
                names = ", ".join(map(str, self._missing()))
                warn(f"{self._alone} (not here after {waited:.0f} s: rank(s) {names} of {self._size})")
            with self._let_through():
                time.sleep(pause)
            pause = min(2.0 * pause, self._longest_pause_s)
        decision: dict[str, Any] = _unpacked(self._store.get(self._key("decision")))
        return decision

    def _decide(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """What is decided for this step: the proposal, unless another was there before it."""
        decision: dict[str, Any] = _unpacked(self._store.compare_set(self._key("decision"), "", _packed(proposal)))
        return decision

    def _notice_of(self, error: BaseException) -> dict[str, Any]:
        return {"failed": self._rank, "error": f"{type(error).__name__}: {error}"[:1000].rstrip(": ")}

    def _missing(self) -> list[int]:
        """The ranks that have not come to this step."""
        return [rank for rank in range(self._size) if not self._store.check([self._key(rank)])]

    def _failure(self, decision: dict[str, Any]) -> RankFailedError:
        outcome = "so this rank stopped too and its model is as it was"
        if "missing" not in decision:
            return RankFailedError(
                f"rank(s) {decision['failed']} of {self._size} failed, {outcome}; the traceback of the failed rank "
                f"says why: {decision['error']}"
            )
        names = ", ".join(map(str, decision["missing"]))
        if self._rank in decision["missing"] and len(decision["missing"]) < self._size:
            return RankFailedError(
                f"rank(s) {names} of {self._size} did not come in the {self._timeout_s:g} s that ranks wait, so the "
                "others have stopped, and this rank comes too late; its model is as it was. If it has left out a call "
                "that the others have made, it stays one behind them: go on with another process group (dist.new_group)"
            )
        error = RankFailedError(
            f"rank(s) {names} of {self._size} did not come in the {self._timeout_s:g} s that ranks wait, {outcome}"
        )
        if self._step == 0:
            add_note(error, self._alone)
        return error

    def _store_lost(self) -> RankFailedError:
        return RankFailedError(
            f"rank {self._rank} of {self._size} cannot reach the store of its process group: the process that keeps "
            "it, rank 0 as a rule, has ended; this rank's model is as it was"
        )

    def _raise_late(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            raise late

    def _sweep(self, step: int) -> None:
        """Remove what a step has left in the store, once every rank has read its decision."""
        for name in ("here", "decision", *range(self._size)):
            self._store.delete_key(f"{self._run}/{step}/{name}")

    def _key(self, name: str | int) -> str:
        return f"{self._run}/{self._step}/{name}"


def _packed(value: object) -> str:
    """JSON; compressed if it is long, for names repeat themselves, and a store takes only so much."""
    text = json.dumps(value)
    if len(text) > _PLAIN_TEXT:
        text = "z" + base64.b64encode(zlib.compress(text.encode(), 1)).decode()  # which no JSON begins with
    if len(text) > _LONGEST_TEXT:
        raise InputError(f"what this rank tells the others takes {len(text)} bytes, more than a store takes")
    return text


def _unpacked(text: str | bytes) -> Any:
    text = text.decode() if isinstance(text, bytes) else text
    return json.loads(zlib.decompress(base64.b64decode(text[1:])) if text.startswith("z") else text)
