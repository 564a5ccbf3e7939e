"""The launch runner: the documented format in, the right processes out, and nothing left running."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from vla_bringup.launch_file import Launch, LaunchError, Process, evaluate, load, parse_arguments

LAUNCH = Path(__file__).resolve().parents[1]


def write(tmp_path, text):
    path = tmp_path / "x.launch.yaml"
    path.write_text(text)
    return path


def test_arguments_conditions_and_groups_decide_what_starts(tmp_path):
    path = write(
        tmp_path,
        """
launch:
- arg: {name: who, default: world}
- arg: {name: extra, default: 'false'}
- let: {name: greeting, value: hello $(var who)}
- executable: {cmd: echo $(var greeting)}
- executable: {cmd: echo never, if: $(var extra)}
- group:
  - if: $(eval "'$(var who)' == 'world' and not $(eval '1 > 2')")
  - let: {name: greeting, value: inner}
  - executable: {cmd: echo $(var greeting)}
- executable: {cmd: echo $(var greeting)}
""",
    )
    assert [p.command for p in load(path)] == [
        ["echo", "hello", "world"],
        ["echo", "inner"],
        ["echo", "hello", "world"],
    ]
    assert [p.command[-1] for p in load(path, {"who": "you", "extra": "true"})] == ["you", "never", "you"]


def test_an_unknown_argument_is_refused_with_the_known_ones(tmp_path):
    path = write(tmp_path, "launch:\n- arg: {name: robot, default: panda, description: which robot}\n")
    with pytest.raises(LaunchError, match="unknown argument 'robto'.*robot: which robot"):
        load(path, {"robto": "x"})


def test_a_value_outside_the_choices_is_refused(tmp_path):
    path = write(tmp_path, "launch:\n- arg: {name: runtime, default: onnx, choice: [{value: onnx}, {value: torch}]}\n")
    with pytest.raises(LaunchError, match="expected one of .*onnx.*torch.*found 'jax'"):
        load(path, {"runtime": "jax"})


@pytest.mark.parametrize("expression", ["__import__('os').system('true')", "open('x')", "(lambda: 1)()", "a.b"])
def test_eval_runs_no_code(expression):
    with pytest.raises(LaunchError):
        evaluate(expression)


def test_words_that_are_no_arguments_are_refused():
    with pytest.raises(LaunchError, match="expected name:=value"):
        parse_arguments(["robot=panda"])


@pytest.mark.parametrize("name", ["robot", "sim", "teleop"])
def test_the_shipped_files_load_and_name_real_executables(name):
    processes = load(LAUNCH / f"{name}.launch.yaml")
    assert processes
    for process in processes:
        assert os.access(process.command[0], os.X_OK), process.command[0]


def test_strategy_given_by_argument_overrides_the_policy_description():
    def executor(arguments):
        return next(p for p in load(LAUNCH / "sim.launch.yaml", arguments) if p.name == "chunk_executor").command

    assert not any(word.startswith("strategy:=") for word in executor({}))
    assert "strategy:=naive" in executor({"strategy": "naive"})


@pytest.mark.parametrize(
    ("name", "arguments", "driven"),
    [
        ("robot", {}, True), ("robot", {"drivers": "false"}, False), ("sim", {}, False),
        ("teleop", {}, True), ("teleop", {"drivers": "false"}, False), ("teleop", {"sim": "true"}, False),
    ],
)  # fmt: skip
def test_the_arms_are_driven_unless_another_node_or_a_simulator_does(name, arguments, driven):
    processes = load(LAUNCH / f"{name}.launch.yaml", arguments)
    assert ("driver_node" in [process.name for process in processes]) == driven


def test_the_driver_that_is_given_takes_the_place_of_the_robots_own():
    for name in ("robot", "teleop"):
        processes = load(LAUNCH / f"{name}.launch.yaml", {"driver": "mujoco"})
        command = next(process.command for process in processes if process.name == "driver_node")
        assert "driver:=mujoco" in command


@pytest.mark.parametrize("name", ["sim.launch.yaml", "robot.launch.yaml"])
def test_every_node_gets_the_dds_profile_unless_the_user_has_one(name, monkeypatch):
    variable = "FASTDDS_DEFAULT_PROFILES_FILE"
    monkeypatch.delenv(variable, raising=False)
    found = {process.environment[variable] for process in load(LAUNCH / name, {})}
    assert len(found) == 1 and Path(found.pop()).read_text() == (LAUNCH / "dds_profile.xml").read_text()
    monkeypatch.setenv(variable, "/own.xml")
    assert {process.environment[variable] for process in load(LAUNCH / name, {})} == {"/own.xml"}


def test_a_policy_is_a_name_or_a_file_of_ones_own(tmp_path):
    def files(arguments):
        processes = load(LAUNCH / "sim.launch.yaml", arguments)
        words = [p.command for p in processes if p.name in ("policy_node", "chunk_executor")]
        return {command[command.index("--params-file") + 1] for command in words}

    own = tmp_path / "mine.yaml"
    own.write_text("/**: {ros__parameters: {checkpoint: somewhere}}\n")
    assert files({"policy": str(own)}) == {str(own)}
    assert files({"policy": "panda_pick"}) == {str(LAUNCH / "policies" / "panda_pick.yaml")}
    with pytest.raises(LaunchError, match="no parameter file .*panda_pikc.*aloha_transfer.*panda_pick"):
        files({"policy": "panda_pikc"})


def test_stopping_ends_every_process_even_one_that_ignores_interrupts():
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    polite = "import time; print('up', flush=True); time.sleep(60)"
    lines = []
    processes = [
        Process(n, [sys.executable, "-c", code], dict(os.environ))
        for n, code in (("stubborn", stubborn), ("polite", polite))
    ]
    with Launch(processes, lambda name, line: lines.append((name, line))) as launch:
        deadline = time.monotonic() + 30
        while sum(line == "up" for _, line in lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        launch.stop()
    assert all(p.popen.poll() is not None for p in processes)
    assert processes[0].popen.returncode == -signal.SIGTERM
    assert ("launch", f"stubborn has ended with exit status {-signal.SIGTERM}") in lines


def test_a_process_that_has_ended_can_be_started_again():
    lines = []
    process = Process("once", [sys.executable, "-c", "print('up')"], dict(os.environ))
    with Launch([process], lambda name, line: lines.append((name, line))) as launch:
        assert launch.wait() == 0
        launch.start(process)
        assert launch.wait() == 0
    assert lines.count(("launch", "once has ended with exit status 0")) == 2
