"""A runner for the subset of the ROS 2 YAML launch format that this project's launch files use.

For environments without `ros2 launch` only. The files themselves stay in the documented format
(https://docs.ros.org, "Using XML, YAML, and Python for ROS 2 launch files"), so `ros2 launch` runs them unchanged.

Actions: arg, let, set_env, group, push_ros_namespace, include, node, executable.
Substitutions: $(var), $(env), $(find-pkg-share), $(find-pkg-prefix), $(dirname), $(eval).
"""

from __future__ import annotations

import ast
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: Time between SIGINT, SIGTERM and SIGKILL when the launch ends, s.
ESCALATION = (6.0, 4.0)
#: Time for processes that end by themselves before they are told to, s.
GRACE = 0.5


class LaunchError(ValueError):
    """A launch file or an argument that cannot be used."""


@dataclass
class Process:
    """One process to start."""

    name: str
    command: list[str]
    environment: dict[str, str]
    #: True: when it ends, everything ends (the `on_exit: shutdown` of the format).
    ends_all: bool = False
    popen: subprocess.Popen | None = field(default=None, repr=False)


@dataclass
class Scope:
    """What a launch file sees: variables, environment, namespace. Groups get copies."""

    directory: Path
    variables: dict[str, str]
    environment: dict[str, str]
    namespace: str = ""

    def copy(self) -> Scope:
        return Scope(self.directory, dict(self.variables), dict(self.environment), self.namespace)


def load(path: str | os.PathLike, arguments: Mapping[str, str] | None = None) -> list[Process]:
    """Read a launch file and return the processes it asks for.

    Raises:
        LaunchError: unknown action, substitution or argument; the message names the file and what was found.
    """
    path = Path(path).resolve()
    given = dict(arguments or {})
    declared: dict[str, str] = {}
    processes: list[Process] = []
    scope = Scope(path.parent, given, dict(os.environ))
    _Reader(path, declared, processes).run(scope)
    unknown = sorted(set(arguments or {}) - set(declared))
    if unknown:
        known = "; ".join(f"{name}: {text}" if text else name for name, text in sorted(declared.items()))
        raise LaunchError(f"{path.name}: unknown argument {unknown[0]!r}; expected one of: {known}")
    return processes


class _Reader:
    def __init__(self, path: Path, declared: dict[str, str], processes: list[Process]):
        self.path, self.declared, self.processes = path, declared, processes

    def run(self, scope: Scope) -> None:
        try:
            tree = yaml.safe_load(self.path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise LaunchError(f"{self.path}: cannot be read: {error}") from error
        if not isinstance(tree, dict) or not isinstance(tree.get("launch"), list):
            raise LaunchError(f"{self.path}: expected a list under `launch`, found {type(tree).__name__}")
        self.actions(tree["launch"], scope)

    def actions(self, entries: list, scope: Scope) -> None:
        for entry in entries:
            if not isinstance(entry, dict) or len(entry) != 1:
                raise LaunchError(f"{self.path}: expected one action an entry, found {entry!r}")
            ((kind, body),) = entry.items()
            action: Callable | None = getattr(self, f"do_{kind}", None)
            if action is None:
                known = sorted(n[3:] for n in dir(self) if n.startswith("do_"))
                raise LaunchError(f"{self.path}: unknown action {kind!r}; expected one of {known}")
            if isinstance(body, dict) and not self.wanted(body, scope):
                continue
            action(body, scope)

    def wanted(self, body: dict, scope: Scope) -> bool:
        if "if" in body and not _truth(self.text(body["if"], scope), self.path):
            return False
        return not ("unless" in body and _truth(self.text(body["unless"], scope), self.path))

    def text(self, value: Any, scope: Scope) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        return substitute(str(value), scope, self.path)

    # ---------------------------------------------------------------------------------------------- actions
    def do_arg(self, body: dict, scope: Scope) -> None:
        name = body["name"]
        self.declared[name] = body.get("description", "")
        if name not in scope.variables:
            if "default" not in body:
                raise LaunchError(f"{self.path.name}: argument {name} is needed: {self.declared[name]}")
            scope.variables[name] = self.text(body["default"], scope)
        choices = [str(c["value"]) for c in body.get("choice", [])]
        if choices and scope.variables[name] not in choices:
            raise LaunchError(
                f"{self.path.name}: argument {name}: expected one of {choices}, found {scope.variables[name]!r}"
            )

    def do_let(self, body: dict, scope: Scope) -> None:
        scope.variables[body["name"]] = self.text(body["value"], scope)

    def do_set_env(self, body: dict, scope: Scope) -> None:
        scope.environment[body["name"]] = self.text(body["value"], scope)

    def do_push_ros_namespace(self, body: dict, scope: Scope) -> None:
        name = self.text(body["namespace"], scope).strip("/")
        scope.namespace = f"{scope.namespace}/{name}" if name else scope.namespace

    def do_group(self, body: dict | list, scope: Scope) -> None:
        # The format writes a group as a list of actions; its condition is an entry of that list.
        entries = body if isinstance(body, list) else [{k: v} for k, v in body.items()]
        conditions = {k: v for e in entries for k, v in e.items() if k in ("if", "unless")}
        if self.wanted(conditions, scope):
            self.actions([e for e in entries if not set(e) & {"if", "unless", "scoped"}], scope.copy())

    def do_include(self, body: dict, scope: Scope) -> None:
        inner = scope.copy()
        for argument in body.get("arg", []):
            inner.variables[argument["name"]] = self.text(argument["value"], scope)
        path = Path(self.text(body["file"], scope))
        inner.directory = path.parent
        _Reader(path, self.declared, self.processes).run(inner)

    def do_node(self, body: dict, scope: Scope) -> None:
        package, executable = self.text(body["pkg"], scope), self.text(body["exec"], scope)
        command = [
            str(_executable(package, executable, self.path)),
            *self.text(body.get("args", ""), scope).split(),
        ]
        ros = []
        name = self.text(body["name"], scope) if "name" in body else ""
        if name:
            ros += ["-r", f"__node:={name}"]
        namespace = self.text(body.get("namespace", scope.namespace), scope)
        if namespace:
            ros += ["-r", f"__ns:={namespace if namespace.startswith('/') else '/' + namespace}"]
        for remap in body.get("remap", []):
            ros += ["-r", f"{self.text(remap['from'], scope)}:={self.text(remap['to'], scope)}"]
        for parameter in body.get("param", []):
            ros += self.parameter(parameter, scope)
        if ros:
            command += ["--ros-args", *ros]
        self.add(name or executable, command, body, scope)

    def do_executable(self, body: dict, scope: Scope) -> None:
        command = self.text(body["cmd"], scope).split()
        name = self.text(body.get("name", Path(command[0]).name), scope)
        self.add(name, command, body, scope)

    def add(self, name: str, command: list[str], body: dict, scope: Scope) -> None:
        environment = dict(scope.environment)
        for variable in body.get("env", []):
            environment[variable["name"]] = self.text(variable["value"], scope)
        ends_all = "shutdown" in str(body.get("on_exit", ""))
        self.processes.append(Process(name, command, environment, ends_all))

    def parameter(self, parameter: dict, scope: Scope) -> list[str]:
        if "from" in parameter:
            file = Path(self.text(parameter["from"], scope))
            if not file.is_file():
                siblings = sorted(p.stem for p in file.parent.glob("*.yaml"))
                raise LaunchError(f"{self.path.name}: no parameter file {file}; beside it there are {siblings}")
            return ["--params-file", str(file)]
        value = parameter["value"]
        if isinstance(value, (list, bool, int, float)):
            shown = yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()
        else:
            text = self.text(value, scope)
            # `ros2 launch` reads a substituted value as YAML too; an empty one must stay a string.
            shown = "''" if text == "" else text
        return ["-p", f"{parameter['name']}:={shown}"]


# ------------------------------------------------------------------------------------------------ substitutions


def substitute(text: str, scope: Scope, path: Path) -> str:
    """Replace every $(…) in `text`, innermost first."""
    out, position = "", 0
    while (start := text.find("$(", position)) >= 0:
        depth, end = 1, start + 2
        quote = ""
        while end < len(text) and depth:
            c = text[end]
            if quote:
                quote = "" if c == quote else quote
            elif c in "'\"":
                quote = c
            elif c == "(":
                depth += 1
            elif c == ")":
                depth -= 1
            end += 1
        if depth:
            raise LaunchError(f"{path.name}: unclosed substitution in {text!r}")
        out += text[position:start] + _one(text[start + 2 : end - 1], scope, path)
        position = end
    return out + text[position:]


def _one(body: str, scope: Scope, path: Path) -> str:
    kind, _, rest = body.partition(" ")
    if kind == "eval":
        expression = rest.strip()
        if expression[:1] in "'\"" and expression[-1:] == expression[:1] and len(expression) > 1:
            expression = expression[1:-1]
        return str(evaluate(substitute(expression, scope, path)))
    rest = substitute(rest, scope, path).strip()
    if kind == "var":
        if rest not in scope.variables:
            raise LaunchError(f"{path.name}: $(var {rest}): no such argument or variable")
        return scope.variables[rest]
    if kind == "env":
        name, *default = rest.split(" ", 1)
        if name not in scope.environment and not default:
            raise LaunchError(f"{path.name}: $(env {name}): not set and no default given")
        return scope.environment.get(name, default[0].strip("'\"") if default else "")
    if kind == "dirname":
        return str(scope.directory)
    if kind == "find-pkg-share":
        return str(_prefix(rest, path) / "share" / rest)
    if kind == "find-pkg-prefix":
        return str(_prefix(rest, path))
    raise LaunchError(f"{path.name}: unknown substitution $({body})")


_OPERATORS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def evaluate(expression: str) -> Any:
    """A Python expression of constants, comparisons, and/or/not, arithmetic and a conditional; nothing else."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BoolOp):
            results = [value(v) for v in node.values]
            return all(results) if isinstance(node.op, ast.And) else any(results)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            return not value(node.operand) if isinstance(node.op, ast.Not) else -value(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _OPERATORS[type(node.ops[0])](value(node.left), value(node.comparators[0]))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.IfExp):
            return value(node.body) if value(node.test) else value(node.orelse)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(e) for e in node.elts]
        raise LaunchError(f"$(eval {expression}): only constants, comparisons, and, or, not, if-else are allowed")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise LaunchError(f"$(eval {expression}): {error.msg}") from error


def _truth(text: str, path: Path) -> bool:
    lowered = text.strip().lower()
    if lowered in ("true", "1"):
        return True
    if lowered in ("false", "0"):
        return False
    raise LaunchError(f"{path.name}: a condition: expected true or false, found {text!r}")


def _prefix(package: str, path: Path) -> Path:
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix and (Path(prefix) / "share" / "ament_index" / "resource_index" / "packages" / package).exists():
            return Path(prefix)
    raise LaunchError(f"{path.name}: package {package!r} is not in the sourced workspace")


def _executable(package: str, name: str, path: Path) -> Path:
    folder = _prefix(package, path) / "lib" / package
    if not (folder / name).is_file():
        found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
        raise LaunchError(f"{path.name}: package {package} has no executable {name!r}; it has {found}")
    return folder / name


# ------------------------------------------------------------------------------------------------------ running


class Launch:
    """Runs the processes of a launch file; a context manager that leaves nothing behind."""

    def __init__(self, processes: list[Process], output: Callable[[str, str], None] | None = None):
        self.processes = processes
        self.output = output or (lambda name, line: print(f"[{name}] {line}", flush=True))
        self._reported: set[str] = set()

    def __enter__(self) -> Launch:
        for process in self.processes:
            self.start(process)
        return self

    def start(self, process: Process) -> None:
        """Start one process of the launch; also one that has ended, again."""
        # In the terminal's own process group, as with `ros2 launch`: a keyboard device can read the terminal, and
        # Ctrl-C reaches every node at once.
        process.popen = subprocess.Popen(
            process.command, env=process.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip
        self._reported.discard(process.name)
        threading.Thread(target=self._pump, args=(process, process.popen), daemon=True).start()

    def _pump(self, process: Process, popen: subprocess.Popen) -> None:
        for line in popen.stdout:
            self.output(process.name, line.rstrip())

    def __exit__(self, *_: object) -> None:
        self.stop()

    def dead(self) -> list[Process]:
        """Processes that have ended by themselves."""
        return [p for p in self.processes if p.popen and p.popen.poll() is not None]

    def report_dead(self) -> None:
        for process in self.dead():
            if process.name not in self._reported:
                self._reported.add(process.name)
                self.output("launch", f"{process.name} has ended with exit status {process.popen.returncode}")

    def wait(self) -> int:
        """Until every process has ended, or one that ends all; returns the worst exit status."""
        while True:
            dead = self.dead()
            self.report_dead()
            if len(dead) == len(self.processes) or any(p.ends_all for p in dead):
                return max((abs(p.popen.returncode) for p in dead), default=0)
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process: SIGINT, then SIGTERM, then SIGKILL."""
        self._await(GRACE)  # those that Ctrl-C has reached already are ending
        for number, patience in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), (*ESCALATION, 2.0)):
            for process in self._alive():
                if number != signal.SIGINT:
                    self.output("launch", f"{process.name} is still running: {number.name}")
                process.popen.send_signal(number)
            self._await(patience)
        self.report_dead()

    def _alive(self) -> list[Process]:
        return [p for p in self.processes if p.popen and p.popen.poll() is None]

    def _await(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.02)


def parse_arguments(arguments: list[str]) -> dict[str, str]:
    """`name:=value` words as a mapping."""
    out = {}
    for argument in arguments:
        name, separator, value = argument.partition(":=")
        if not separator or not name:
            raise LaunchError(f"argument {argument!r}: expected name:=value")
        out[name] = value
    return out


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m vla_bringup.launch_file FILE [name:=value ...]", file=sys.stderr)
        return 2
    try:
        processes = load(sys.argv[1], parse_arguments(sys.argv[2:]))
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: what a shell script starts in the background begins with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with Launch(processes) as launch:
        try:
            return launch.wait()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
