"""Arms behind a vendor's library whose calls may block: what the drivers of Franka and xArm have in common.

Each connection has a thread that makes the library's calls: it hands the newest target on and does what stop asks for;
and one more for the gripper. `read` and `send` only exchange values with them.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, DriverError


class Link:
    """One connection: all that its threads and the driver exchange, under the lock of `wake`.

    Each connection has its own, so that a thread that comes late from a call of a connection that was given up can
    neither end, nor spoil, nor command the one after it.

    device: the library's object. state: newest, without gripper and halted. target, opening: newest that are not taken
    yet. opened: the gripper's measured opening. stop: category that is not done yet. ending: no more is wanted.
    follows: whether targets are taken; halted: why not; fault: why the connection is of no use.
    """

    def __init__(self) -> None:
        self.wake = threading.Condition()
        self.device: Any = None
        self.state: ArmState | None = None
        self.target: ArmTarget | None = None
        self.opening: float | None = None
        self.opened: float | None = None
        self.stop: int | None = None
        self.ending = self.follows = False
        self.halted = self.fault = ""

    def halt(self, why: str) -> None:
        """The arm does not follow any more, whoever wanted that; it stays so until connect."""
        with self.wake:
            if self.follows:
                self.follows, self.target, self.opening, self.halted = False, None, None, why
                self.wake.notify_all()

    def fail(self, why: str) -> str:
        """The connection is of no use any more. Returns why it first was so."""
        with self.wake:
            self.follows, self.target = False, None
            self.fault = self.fault or why
            self.wake.notify_all()
            return self.fault


class LinkedArm(ArmDriver):
    """An arm with a Link. A vendor's driver says how to open it, and what its threads do in a turn."""

    #: In errors and in the names of threads.
    KIND: ClassVar[str]
    #: How often the arm says its state, s.
    EVERY: ClassVar[float]

    def __init__(self, arm: ArmInfo, config: Any, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        self._link: Link | None = None
        self._threads: list[threading.Thread] = []

    # What a vendor's library says.

    @abstractmethod
    def _make_link(self) -> Link:
        """A link that is not open."""

    @abstractmethod
    def _open(self, link: Link) -> None:
        """Connect, check, and let the arm hold. Raises DriverError; what may block is done by `within`."""

    @abstractmethod
    def _turn(self, link: Link, target: ArmTarget | None, stop: int | None) -> None:
        """Hand a target on, or stop. At least once a period; whatever it raises is a fault of the link."""

    @abstractmethod
    def _grip(self, link: Link, opening: float | None) -> None:
        """Move the gripper to an opening, if one is given, and read where it is. 20 times a second."""

    @abstractmethod
    def _part(self, link: Link) -> None:
        """Let go of the device; never raises."""

    # What every such arm does.

    def connect(self) -> None:
        self.close()
        self._link = link = self._make_link()
        try:
            self._open(link)
        except BaseException:
            self.close()
            raise
        with link.wake:
            link.follows = True
        loops = [(self._stream, "")] + [(self._grips, " gripper")] * self.arm.gripper
        self._threads = [
            threading.Thread(target=loop, args=(link,), name=f"{self.arm.name} {self.KIND}{what}", daemon=True)
            for loop, what in loops
        ]
        for thread in self._threads:
            thread.start()

    def read(self) -> ArmState:
        link = self._linked()
        with link.wake:
            state, halted = link.state, link.halted
        age = self.clock() - state.stamp
        if age > self.config.stale:
            raise self._error(link.fail(f"expected a state every {self.EVERY:g} s, found none for {age:.2f} s"))
        gripper = link.opened if self.arm.gripper else None
        return ArmState(
            state.stamp, state.position.copy(), state.velocity.copy(), state.effort, state.wrench, gripper, halted
        )

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        link = self._linked()
        with link.wake:
            if not link.follows:
                raise self._error(link.fault or f"expected an arm that follows, found it {link.halted}")
            link.target = target
            if target.gripper is not None:
                link.opening = target.gripper
            link.wake.notify_all()

    def stop(self, category: int) -> int:
        done = self.stop_category(category)
        if (link := self._link) is not None:
            with link.wake:
                link.follows, link.target, link.opening = False, None, None
                link.halted = link.halted or f"stopped, category {done}"
                link.stop = category if link.stop is None else min(category, link.stop)
                link.wake.notify_all()
        return done

    def close(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        with link.wake:
            if link.follows:
                link.stop = 2
            link.follows, link.ending = False, True
            link.wake.notify_all()
        for thread in self._threads:
            thread.join(self._patience())
        self._threads = []
        link.fail("closed")  # whoever is late finds nothing left to do
        self._part(link)

    def within(self, call: Callable[[], Any], what: str) -> None:
        """Do what may block, for the setting `patience`, s, at most."""
        ended: list[str] = []

        def run() -> None:
            try:
                call()
                ended.append("")
            except Exception as error:
                ended.append(str(error))

        thread = threading.Thread(target=run, name=f"{self.arm.name} {self.KIND} {what}", daemon=True)
        thread.start()
        thread.join(self.config.patience)
        if not ended or ended[0]:
            found = ended[0] if ended else f"no end after {self.config.patience:g} s"
            raise self._error(f"expected {what}, found: {found}")

    def _patience(self) -> float:
        """s that a thread may take to end."""
        return self.config.patience

    def _error(self, text: str) -> DriverError:
        return DriverError(f"arm {self.arm.name}: {self.KIND} {self.config.address}: {text}")

    def _linked(self) -> Link:
        link = self._link
        if link is None or link.fault:
            raise self._error(link.fault if link else "expected a connected arm, found none")
        return link

    def _stream(self, link: Link) -> None:
        """The thread of the arm."""
        while True:
            with link.wake:
                link.wake.wait_for(
                    lambda: link.ending or link.target is not None or link.stop is not None, self.arm.period
                )
                target, link.target = link.target, None
                stop, link.stop = link.stop, None
                ending = link.ending
            try:
                if not link.fault:  # else it does not hear a stop either
                    self._turn(link, target, stop)
            except Exception as error:
                link.fail(f"expected an answer, found {type(error).__name__}: {error}")
            if ending:
                return

    def _grips(self, link: Link) -> None:
        """The thread of the gripper."""
        while True:
            with link.wake:
                link.wake.wait_for(lambda: link.ending, 0.05)
                opening = link.opening if link.follows else None
                if link.ending or link.fault:
                    return
            try:
                self._grip(link, opening)
            except Exception as error:
                if not link.ending:
                    link.fail(f"gripper: expected an answer, found {type(error).__name__}: {error}")
