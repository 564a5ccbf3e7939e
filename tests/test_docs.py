"""The documentation names what the sources declare: parameters, launch arguments, robot keys, messages, links.

Reads sources as text and syntax trees, so nearly all of it needs neither ROS nor torch. What it compares with a section
of a page are the rows of that section's tables: first cell the name, second cell the default.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "ros2_ws" / "src"
DOCS = ROOT / "docs"
#: Node files that declare the fields of dataclasses in a loop: (file, class) in the order of inheritance.
LOOPS = {
    "chunk_executor_node": [("vla_execution/vla_execution/strategies.py", "ExecutionConfig")],
    "safety_controller_node": [
        ("vla_control/vla_control/goal.py", "MotionLimits"),
        ("vla_control/vla_control/safety.py", "SafetyLimits"),
    ],
}
NODES = {path.stem: path for path in sorted(SOURCES.glob("*/vla_*/*_node.py"))}
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.yaml"))
INTERFACES = sorted([*(SOURCES / "vla_msgs/msg").glob("*.msg"), *(SOURCES / "vla_msgs/srv").glob("*.srv")])
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


# ------------------------------------------------------------------------------------------------ reading the sources


def declared_parameters(node: str) -> dict[str, object]:
    """Parameter -> default of a node file; the default is None where the source computes it."""
    tree = ast.parse(NODES[node].read_text())
    found, looped = {}, False
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in ("declare_parameter", "declare") or not call.args:
            continue
        if isinstance(call.args[0], ast.Constant):
            default = call.args[1] if len(call.args) > 1 else None
            found[call.args[0].value] = default.value if isinstance(default, ast.Constant) else None
        else:
            looped = True
    assert looped == (node in LOOPS), f"{node}: declares parameters in a loop; name the dataclass in LOOPS"
    for file, kind in LOOPS.get(node, []):
        found |= dataclass_fields(SOURCES / file, kind)
    return found


def dataclass_fields(path: Path, kind: str) -> dict[str, object]:
    """Field -> default of a class in a source file; None where the default is no plain constant."""
    classes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef) and n.name == kind]
    assert classes, f"{path}: no class {kind}"
    fields = [n for n in classes[0].body if isinstance(n, ast.AnnAssign)]
    return {f.target.id: f.value.value if isinstance(f.value, ast.Constant) else None for f in fields}


def interface_names(path: Path) -> list[str]:
    """Names of the fields and constants of a message or service."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [re.split(r"[=\s]", line.split(maxsplit=1)[1])[0] for line in lines if line and line != "---"]


# -------------------------------------------------------------------------------------------------- reading the pages


def section(page: str, title: str) -> str:
    """The text below a heading up to the next one of the same or a higher level."""
    text = (DOCS / page).read_text()
    head = re.search(rf"^(#+) `?{re.escape(title)}`?$", text, re.MULTILINE)
    assert head, f"docs/{page}: expected a section {title!r}"
    rest = text[head.end() :]
    after = re.search(rf"^#{{1,{len(head[1])}}} ", rest, re.MULTILINE)
    return rest[: after.start()] if after else rest


def rows(text: str) -> dict[str, str]:
    """First cell -> second cell of every table row whose first cell is `code`."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", text, re.MULTILINE))


def shown(value: object) -> str:
    """How a page writes a default."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else '`""`'


def check_table(where: str, table: dict[str, str], declared: dict[str, object]) -> None:
    missing, unknown = sorted(set(declared) - set(table)), sorted(set(table) - set(declared))
    assert not missing, f"{where}: lacks {missing}"
    assert not unknown, f"{where}: names {unknown}, which the source does not declare"
    for name, default in declared.items():
        assert default is None or table[name] == shown(default), (
            f"{where}: {name}: expected the default {shown(default)}, found {table[name]}"
        )


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("node", NODES)
def test_every_parameter_of_a_node_is_documented_with_its_default(node):
    check_table(f"parameters.md: {node}", rows(section("parameters.md", node)), declared_parameters(node))


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_launch_argument_is_documented_with_its_default(path):
    arguments = [action["arg"] for action in yaml.safe_load(path.read_text())["launch"] if "arg" in action]
    declared = {a["name"]: a.get("default") for a in arguments}
    check_table(f"parameters.md: {path.name}", rows(section("parameters.md", path.name)), declared)


def test_every_key_of_a_robot_description_is_documented():
    source = (SOURCES / "vla_core/vla_core/robot.py").read_text()
    keys = set(re.findall(r'\.get\("([a-z_]+)"', source)) | {"lower", "upper", "velocity", "acceleration"}
    text = section("parameters.md", "Robot description")
    assert not [key for key in sorted(keys) if not re.search(rf"`[\w<>.]*\b{key}\b[^`]*`", text)]


def test_the_robot_of_the_howto_loads(tmp_path):
    from vla_core.kinematics import Kinematics
    from vla_core.robot import load_robot

    example = re.search(r"```yaml\n(name: mine\n.*?)```", section("howto.md", "A robot"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example[1])
    robot = load_robot(tmp_path / "mine.yaml")
    assert Kinematics(robot).forward("arm", robot.arm("arm").home).shape == (4, 4)


def test_every_option_of_training_is_documented():
    source = ROOT / "models/vla_models/train.py"
    text = section("parameters.md", "Training")
    options = set(re.findall(r'add_argument\("(--[\w-]+)"', source.read_text()))
    assert not [o for o in sorted(options) if f"`{o}`" not in text]
    check_table("parameters.md: settings", rows(section("parameters.md", "Settings of a training")),
                dataclass_fields(source, "TrainConfig"))  # fmt: skip


@pytest.mark.parametrize("path", INTERFACES, ids=lambda path: path.name)
def test_every_message_and_field_is_documented(path):
    text = section("messages.md", path.stem)
    assert not [name for name in interface_names(path) if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [t for t in targets if "://" not in t]
    assert not [t for t in local if not (page.parent / t).exists()]


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text]
