"""From an observation to a network's inputs and from its output to metric targets: written once, NumPy and OpenCV.

The torch runtime, the ONNX runtime and the training data all pass through these functions, so a policy sees in use
exactly what it saw in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from vla_core import se3

from vla_models.normalization import Normalizer
from vla_models.policy import (
    ArmState,
    ChunkPrefix,
    InferenceRequest,
    ModelInputs,
    PolicyError,
    PolicyObservation,
    PolicySpec,
)
from vla_models.tokenizer import make_tokenizer


def resize_image(image: np.ndarray, size: tuple[int, int], fit: str = "stretch") -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8 at `size` = (height, width), by pixel area. fit: PolicySpec.fit."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise PolicyError(f"image: expected (H, W, 3) uint8, found {image.shape} {image.dtype}")
    if image.shape[:2] == tuple(size):
        return np.ascontiguousarray(image)
    if fit in ("pad", "pad_corner"):
        scale = max(image.shape[0] / size[0], image.shape[1] / size[1])
        height, width = max(1, int(image.shape[0] / scale)), max(1, int(image.shape[1] / scale))
        share = 2 if fit == "pad" else 1
        top, left = (size[0] - height) // share, (size[1] - width) // share
        out = np.zeros((*size, 3), np.uint8)
        out[top : top + height, left : left + width] = resize_image(image, (height, width))
        return out
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def image_tensor(images: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) uint8 -> (..., 3, h, w) float32 in [0, 1], contiguous."""
    return np.ascontiguousarray(np.moveaxis(images, -1, -3)).astype(np.float32) / np.float32(255.0)


def state_vector(spec: PolicySpec, state: Mapping[str, ArmState]) -> np.ndarray:
    """(state_dim,) float64, raw, in m, rad and openings; see vla_models.policy.STATES."""
    parts = []
    for name in spec.arms:
        arm = _arm(spec, state, name)
        if spec.state == "pose":
            matrix = se3.pose_to_matrix(np.asarray(arm.tool, float))
            parts += [matrix[:3, 3], se3.matrix_to_rot6d(matrix[:3, :3]), [arm.gripper]]
        elif spec.state == "libero":
            parts += [np.asarray(arm.tool[:3], float), axis_angle(arm.tool[3:]), [arm.gripper, -arm.gripper]]
        else:
            parts += [_joints(spec, name, arm), [arm.gripper]]
    return np.concatenate(parts)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(4,) xyzw -> axis times angle (3,), of the two that mean the same the one with x >= 0 and an angle up to 2 pi.

    So there is no jump where a gripper points straight down (a half turn about x), as there is at the end of [0, pi].
    """
    x = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    x = -x if x[0] < 0 else x
    length = np.linalg.norm(x[:3])
    return x[:3] * (2.0 if length < 1e-9 else 2.0 * np.arctan2(length, x[3]) / length)


def anchor_vector(spec: PolicySpec, state: Mapping[str, ArmState]) -> np.ndarray:
    """(target_dim,) float64: the measured state in the target layout, what relative actions refer to."""
    parts = []
    for name in spec.arms:
        arm = _arm(spec, state, name)
        parts += [
            np.asarray(arm.tool, float) if spec.action_space.kind == "pose" else _joints(spec, name, arm),
            [arm.gripper],
        ]
    return np.concatenate(parts)


class Processor:
    """Everything around the network of one policy.

    normalizers: {"state": Normalizer, "action": Normalizer}. folder: of the checkpoint, where a tokenizer.json lies.
    """

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], folder: Path | None = None):
        self.spec = spec
        self.state: Normalizer = normalizers["state"]
        self.action: Normalizer = normalizers["action"]
        self.tokenizer = make_tokenizer(spec.tokenizer, spec.vocabulary, spec.context, spec.padding, folder)
        for name, normalizer, dim in (("state", self.state, spec.state_dim), ("action", self.action, spec.action_dim)):
            if normalizer.offset.shape[-1] != dim:
                raise PolicyError(
                    f"policy {spec.name}: {name} normaliser: expected {dim} numbers, found "
                    f"{normalizer.offset.shape[-1]}"
                )

    def inputs(self, observation: PolicyObservation) -> tuple[ModelInputs, np.ndarray]:
        """Inputs for a batch of one, and the anchor (target_dim,)."""
        spec = self.spec
        frames = (*observation.history, observation)[-spec.history :]
        frames = (*[frames[0]] * (spec.history - len(frames)), *frames)
        present = [camera in observation.images or camera not in spec.optional for camera in spec.cameras]
        images = []
        for (camera, size), there in zip(spec.cameras.items(), present, strict=True):
            pictures = [self._picture(frame, camera, size) if there else np.zeros((*size, 3), np.uint8)
                        for frame in frames]  # fmt: skip
            images.append(image_tensor(np.stack(pictures if spec.history > 1 else pictures[0][None])))
        states = self.state.normalize(np.stack([state_vector(spec, frame.state) for frame in frames]))
        tokens = self.tokens(observation.instruction, states[-1])[None]
        if spec.history > 1:
            images, states = [image[None] for image in images], states[None]
        return ModelInputs(tuple(images), tokens, states, np.array([present])), anchor_vector(spec, observation.state)

    def tokens(self, instruction: str, state: np.ndarray) -> np.ndarray:
        """(context,) int64 of the prompt. state: (state_dim,), normalised."""
        prompt = self.spec.prompt
        if "{state}" not in prompt:
            return self.tokenizer.encode(prompt.format(task=instruction, lower=instruction.lower(), state=""))
        bins = np.clip(np.floor((state + 1.0) * 128.0), -1, 255).astype(int)
        written = " ".join(map(str, bins))
        return self.tokenizer.encode(prompt.format(task=instruction, lower=instruction.lower(), state=written))

    def _picture(self, frame: PolicyObservation, camera: str, size: tuple[int, int]) -> np.ndarray:
        if camera not in frame.images:
            raise PolicyError(
                f"policy {self.spec.name}: observation: expected camera {camera!r}, found {sorted(frame.images)}"
            )
        return resize_image(frame.images[camera], size, self.spec.fit)

    def actions(self, targets: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Absolute targets (..., H, target_dim) -> normalised actions (..., H, dim) float32 relative to `anchor`."""
        return self.action.normalize(self.spec.action_space.encode(targets, anchor))

    def targets(self, actions: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Normalised actions (H, dim) -> absolute targets (H, target_dim), float64; quaternions of unit length."""
        return self.spec.action_space.decode(self.action.denormalize(actions), anchor)

    def prefix(
        self, request: InferenceRequest, anchor: np.ndarray, width: int | None = None
    ) -> ChunkPrefix | None:
        """The remainder of the running chunk as the sampler takes it; None when the request asks for no guidance.

        width: numbers an action inside the network; beyond those of the action space the target is 0, as in training.
        """
        spec = self.spec
        if not request.guidance or request.remainder is None or len(request.remainder) <= spec.lead:
            return None
        if request.guidance not in spec.guidance:
            raise PolicyError(
                f"policy {spec.name}: guidance {request.guidance!r} is not supported; it supports "
                f"{list(spec.guidance) or 'none'}"
            )
        remainder = np.asarray(request.remainder, float)[spec.lead : spec.length]
        steps = max(request.delay - spec.lead, 0)
        if remainder.ndim != 2 or remainder.shape[1] != spec.target_dim:
            raise PolicyError(
                f"policy {spec.name}: remainder: expected (K, {spec.target_dim}), found {remainder.shape}"
            )
        length = len(remainder)
        padded = np.concatenate([remainder, np.repeat(remainder[-1:], spec.horizon - length, axis=0)])
        target = self.actions(padded, anchor)[None]
        target = np.pad(target, ((0, 0), (0, 0), (0, (width or spec.action_dim) - spec.action_dim)))
        weights = np.zeros(spec.horizon, np.float32)
        if request.guidance == "guided":
            from vla_execution.rtc import prefix_weights

            # Beyond the remainder there is only padding: guide no further.
            horizon = min(max(request.execution_horizon, spec.horizon - length), spec.horizon)
            delay = min(steps, spec.horizon)
            weights = prefix_weights(spec.horizon, delay, horizon, request.schedule).astype(np.float32)
        known = np.arange(spec.horizon) < min(steps, length, spec.prefix_limit)
        return ChunkPrefix(request.guidance, target, weights, known[None], float(request.beta))


def _arm(spec: PolicySpec, state: Mapping[str, ArmState], name: str) -> ArmState:
    if name not in state:
        raise PolicyError(f"policy {spec.name}: observation: expected arm {name!r}, found {sorted(state)}")
    return state[name]


def _joints(spec: PolicySpec, name: str, arm: ArmState) -> np.ndarray:
    joints = np.asarray(arm.joints, float)
    if name not in spec.joints or joints.shape != (len(spec.joints[name]),):
        raise PolicyError(
            f"policy {spec.name}: arm {name!r}: expected {len(spec.joints.get(name, ()))} joints, found {joints.shape}"
        )
    return joints
