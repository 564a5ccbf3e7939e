"""Holds policies side by side: loads, checks, warms up, switches, infers. No ROS."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import vla_models
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot
from vla_core.se3 import matrix_to_pose
from vla_models.policy import ArmState, InferenceRequest, Policy, PolicyObservation, PolicyOutput

from vla_policy.contract import check
from vla_policy.description import PolicyDescription

#: Inferences before a policy counts as warm: the first ones allocate, compile and fill caches.
WARM_UP_INFERENCES = 3


class PolicyHost:
    """The policies of one robot, one of which is active.

    Args:
        robot: the robot every policy is checked against.
        runtime: "torch" or "onnx", the default of `load`.
        provider: "cpu", "cuda" or "tensorrt".
        threads: threads of one inference; 0 leaves it to the runtime.
        precision: "fp32", or with onnx "int8", "fp16" or "bf16"; of policies on `runtime`.

    Thread safety: `load`, `switch` and `infer` may be called from different threads; loading does not hold up
    inference, and `infer` runs one inference at a time.
    """

    def __init__(
        self, robot: Robot, runtime: str = "onnx", provider: str = "cpu", threads: int = 0, precision: str = "fp32"
    ):
        self.robot, self.runtime, self.provider, self.threads = robot, runtime, provider, threads
        self.precision = precision
        self._policies: dict[str, Policy] = {}
        self._active: str | None = None
        self._fresh = False
        self._inference = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        return sorted(self._policies)

    @property
    def active(self) -> str:
        """Name of the policy that drives; empty when none does."""
        return self._active or ""

    @property
    def policy(self) -> Policy | None:
        return self._policies.get(self._active) if self._active else None

    def load(self, description: PolicyDescription, runtime: str = "") -> Policy:
        """Load a checkpoint beside the others, check it against the robot and warm it up.

        Raises:
            ValueError: the checkpoint cannot be read (CheckpointError) or does not fit (ContractError).
        """
        policy = vla_models.load(
            description.checkpoint,
            runtime=runtime or self.runtime,
            provider=self.provider,
            threads=self.threads,
            precision=self.precision if runtime in ("", self.runtime) else "fp32",
        )
        check(policy.spec, self.robot)
        self._warm_up(policy)
        self._policies[description.name] = policy
        return policy

    def switch(self, name: str) -> None:
        """Let a loaded policy drive from the next inference on."""
        if name not in self._policies:
            raise KeyError(f"policy {name!r}: expected a loaded one of {self.loaded}")
        self._active, self._fresh = name, True

    def clear(self) -> None:
        self._policies, self._active = {}, None

    def reset(self) -> None:
        """Let the active policy forget what it has seen; waits for an inference that runs."""
        with self._inference:
            if self.policy is not None:
                self.policy.reset()

    def infer(self, observation: PolicyObservation, request: InferenceRequest) -> tuple[PolicyOutput, Policy, bool]:
        """One chunk of the active policy: its output, the policy, and whether this was its first after a switch."""
        with self._inference:
            policy = self.policy
            if policy is None:
                raise RuntimeError("no policy is active")
            fresh, self._fresh = self._fresh, False
            if fresh:
                policy.reset()  # what it remembers is from warming up, or from when it last drove
            return policy.infer(observation, request), policy, fresh

    def _warm_up(self, policy: Policy) -> None:
        observation = example_observation(policy, self.robot)
        requests: Sequence[InferenceRequest] = [InferenceRequest()]
        for guidance in policy.spec.guidance:
            # An unguided chunk serves as the remainder.
            remainder = policy.infer(observation, InferenceRequest()).targets
            requests.append(
                replace(
                    InferenceRequest(), remainder=remainder, delay=1, guidance=guidance,
                    execution_horizon=policy.spec.horizon // 2,
                )
            )  # fmt: skip
        for request in requests:
            for _ in range(WARM_UP_INFERENCES):
                policy.infer(observation, request)


def example_observation(policy: Policy, robot: Robot) -> PolicyObservation:
    """An observation of the right shape: grey images, the arms at home, a known instruction."""
    kinematics = Kinematics(robot)
    sizes = {camera.name: (camera.height, camera.width) for camera in robot.cameras}
    images = {name: np.full((*sizes[name], 3), 128, np.uint8) for name in policy.spec.cameras if name in sizes}
    state = {
        arm.name: ArmState(
            joints=np.array(arm.home),
            tool=matrix_to_pose(kinematics.forward(arm.name, arm.home)),
            gripper=1.0,
        )
        for arm in robot.arms
    }
    # Any word that the policy knows; index 0 is padding.
    instruction = policy.spec.example_instruction
    return PolicyObservation(images=images, state=state, instruction=instruction, time=0.0)
