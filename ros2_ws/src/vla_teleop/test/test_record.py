"""`./vla record`: keys at a terminal start and end episodes of a recorder that it starts itself."""

import os
import pty
import select
import sys
import time

from vla_teleop import bags


def expect(terminal: int, text: str, seconds: float = 20.0) -> None:
    """Read the terminal until `text` came."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, f"expected {text!r}, found {seen!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="ignore")


def test_keys_record_a_success_a_failure_and_throw_one_away(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "vla_teleop.record", "--folder", str(tmp_path), "--task", "pick"]
        os.execv(sys.executable, command)
    expect(terminal, "q quit")
    for keys in ("se", "sf", "sd"):
        for key, answer in zip(keys, ("recording", {"e": "as success", "f": "as failure", "d": "discarded"}[keys[1]])):
            os.write(terminal, key.encode())
            expect(terminal, answer)
    os.write(terminal, b"q")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [bags.info(f).facts["outcome"] for f in bags.find(tmp_path)] == ["success", "failure"]
