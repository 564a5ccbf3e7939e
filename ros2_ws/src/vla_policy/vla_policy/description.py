"""Policy descriptions: `launch/policies/<name>.yaml`, the parameters under which a policy runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from vla_core.robot import RobotError, find_description, resolve_uri

SEARCH_PATH_VARIABLE = "VLA_POLICY_PATH"


class DescriptionError(ValueError):
    """A policy description that cannot be used."""


@dataclass(frozen=True)
class PolicyDescription:
    """Name of a policy and the folder of its checkpoint."""

    name: str
    checkpoint: Path


def load_description(name_or_path: str | os.PathLike) -> PolicyDescription:
    """Read a policy description: a checkpoint folder, a YAML file, or a name in `launch/policies/`.

    Raises:
        DescriptionError: neither of them, or a YAML file without a `checkpoint` parameter.
    """
    text = str(name_or_path)
    try:
        if text.startswith("package://") or Path(text).is_dir():
            folder = resolve_uri(text)
            return PolicyDescription(folder.name, folder)
        path = find_description(text, "policies", SEARCH_PATH_VARIABLE)
        parameters = load_parameters(path)
        if "checkpoint" not in parameters:
            raise DescriptionError(f"{path}: checkpoint: missing; found parameters {sorted(parameters)}")
        return PolicyDescription(path.stem, resolve_uri(parameters["checkpoint"], path.parent))
    except RobotError as error:
        raise DescriptionError(str(error)) from error


def load_parameters(name_or_path: str | os.PathLike) -> dict:
    """All parameters of a policy description, whatever node they are for."""
    path = find_description(name_or_path, "policies", SEARCH_PATH_VARIABLE)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
        return {k: v for node in tree.values() for k, v in node["ros__parameters"].items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DescriptionError(f"{path}: expected a ROS 2 parameter file: {error!r}") from error
