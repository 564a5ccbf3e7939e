"""Training batches from episodes: split, augmentation, normalisation. NumPy only; the order of samples is a function
of (seed, step), so that a resumed training sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from vla_models.episodes import DataError, Episode
from vla_models.normalization import Normalizer
from vla_models.policy import PolicySpec
from vla_models.preprocess import Processor
from vla_models.tokenizer import Tokenizer

#: Samples used for normaliser statistics, at most.
STATISTICS = 20_000


class Dataset:
    """Every tick of some episodes as a training sample.

    processor: of the policy, so that samples are prepared as in use. shift: largest random shift of images, pixels of
    the network's image (Kostrikov et al., arXiv 2004.13649); 0: none.
    """

    def __init__(self, episodes: Sequence[Episode], processor: Processor, shift: int = 0):
        if not episodes:
            raise DataError("dataset: expected at least one episode, found none")
        self.episodes = list(episodes)
        self.processor = processor
        self.shift = shift
        self._ends = np.cumsum([len(episode) for episode in episodes])
        blank = np.zeros(processor.spec.state_dim)
        self._reads_state = "{state}" in processor.spec.prompt
        self._tokens = np.stack([processor.tokens(episode.instruction, blank) for episode in episodes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, size: int, seed: int, step: int) -> dict[str, np.ndarray]:
        """A random batch, the same for the same (seed, step)."""
        rng = np.random.default_rng([seed, step])
        return self.batch(rng.integers(len(self), size=size), rng)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Samples as arrays; images are shifted when `rng` is given.

        camera/<name> (B, h, w, 3) uint8; tokens (B, context) int64; state (B, state_dim) and actions (B, H, dim)
        float32, normalised; padded (B, H) bool; present (B, cameras) bool. With a history of T observations
        images and state have T after B; with a future of F pictures future/<name> is (B, F, h, w, 3).
        """
        places = [self._place(int(index)) for index in indices]
        pick = [(self.episodes[e], t) for e, t in places]
        spec = self.processor.spec
        out = {}
        for name in spec.cameras:
            images = np.stack([self._picture(self._images(name, episode, t), rng) for episode, t in pick])
            if spec.future:
                out[f"future/{name}"] = images[:, -spec.future :]
                images = images[:, : -spec.future] if spec.history > 1 else images[:, 0]
            out[f"camera/{name}"] = images
        out["present"] = np.array([[name in episode.images for name in spec.cameras] for episode, _ in pick])
        anchor = np.stack([episode.anchor[t] for episode, t in pick])
        targets = np.stack([episode.targets[t] for episode, t in pick]).astype(np.float64)
        valid = np.array([episode.valid[t] for episode, t in pick])
        state = np.stack([self._seen(episode.state, episode, t) for episode, t in pick])
        out["state"] = self.processor.state.normalize(state)
        out["tokens"] = self._tokens[[e for e, _ in places]]
        if self._reads_state:
            now = out["state"][:, -1] if self.processor.spec.history > 1 else out["state"]
            out["tokens"] = np.stack([self.processor.tokens(episode.instruction, vector)
                                      for (episode, _), vector in zip(pick, now, strict=True)])  # fmt: skip
        out["actions"] = self.processor.actions(targets, anchor)
        out["padded"] = np.arange(targets.shape[1]) >= valid[:, None]
        return out

    def _place(self, index: int) -> tuple[int, int]:
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return episode, index - int(self._ends[episode] - len(self.episodes[episode]))

    def _images(self, name: str, episode: Episode, tick: int) -> np.ndarray:
        """What a camera saw at a tick and, for systems that learn from video, afterwards, stacked."""
        spec = self.processor.spec
        if name not in episode.images:  # a camera that the policy can do without
            count = spec.history + spec.future
            return np.zeros((*([count] if count > 1 else []), *spec.cameras[name], 3), np.uint8)
        seen = self._seen(episode.images[name], episode, tick)
        if not spec.future:
            return seen
        wanted = episode.times[tick] + spec.period * spec.horizon * np.arange(1, spec.future + 1) / spec.future
        later = episode.images[name][np.abs(episode.times - wanted[:, None]).argmin(1)]
        return np.concatenate([seen if spec.history > 1 else seen[None], later])

    def _seen(self, values: np.ndarray, episode: Episode, tick: int) -> np.ndarray:
        """What was seen at a tick: values[tick], or with a history those of the ticks nearest to each time, stacked."""
        spec = self.processor.spec
        if spec.history == 1:
            return values[tick]
        wanted = episode.times[tick] - spec.period * np.arange(spec.history - 1, -1, -1)
        return values[np.abs(episode.times - wanted[:, None]).argmin(1)]

    def _picture(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if rng is None or self.shift == 0:
            return image
        (dy, dx), (height, width) = rng.integers(-self.shift, self.shift + 1, 2), image.shape[-3:-1]
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        return image[..., rows, :, :][..., columns, :]


class WebData:
    """Pictures with questions and answers, to train on beside a robot's data (co-fine-tuning).

    path: lines of JSON, {"image": file, from the folder of `path`, "question": text, "answer": text}. Raises DataError.
    """

    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        try:
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]
            self.samples = [(self.path.parent / s["image"], str(s["question"]), str(s["answer"])) for s in lines]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected lines of JSON with image, question and answer, found {error!r}"
            ) from error
        if not self.samples:
            raise DataError(f"{path}: expected lines of JSON with image, question and answer, found none")
        if missing := [str(image) for image, _, _ in self.samples if not image.is_file()]:
            raise DataError(f"{path}: {len(missing)} pictures are missing, first {missing[0]}")

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, size: int, seed: int, step: int) -> tuple[list[np.ndarray], list[str], list[str]]:
        """Pictures (H, W, 3) uint8 RGB, questions and answers, the same for the same (seed, step)."""
        chosen = np.random.default_rng([seed, step, 23]).integers(len(self), size=size)
        images, questions, answers = zip(*(self.samples[i] for i in chosen), strict=True)
        return [self._picture(image) for image in images], list(questions), list(answers)

    def _picture(self, path: Path) -> np.ndarray:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f"{path}: expected a picture that can be read")
        return np.ascontiguousarray(image[..., ::-1])


def split(episodes: Sequence[Episode], share: float, seed: int) -> tuple[list[Episode], list[Episode]]:
    """(training, validation) by whole episodes; `share` of them, at least one when there are two, for validation."""
    if len(episodes) < 2 or share <= 0:
        return list(episodes), []
    order = np.random.default_rng([seed, 7]).permutation(len(episodes))
    held = set(order[: max(1, round(share * len(episodes)))].tolist())
    return ([e for i, e in enumerate(episodes) if i not in held], [e for i, e in enumerate(episodes) if i in held])


def fit_normalizers(episodes: Sequence[Episode], spec: PolicySpec, kinds: Mapping[str, str]) -> dict[str, Normalizer]:
    """Statistics of states and encoded actions over (at most STATISTICS evenly chosen) ticks of `episodes`."""
    stride = max(1, sum(map(len, episodes)) // STATISTICS)
    states = np.concatenate([episode.state[::stride] for episode in episodes])
    actions = np.concatenate(
        [
            spec.action_space.encode(np.asarray(episode.targets[::stride], float), episode.anchor[::stride]).reshape(
                -1, spec.action_dim
            )
            for episode in episodes
        ]
    )
    return {"state": Normalizer.fit(kinds["state"], states), "action": Normalizer.fit(kinds["action"], actions)}


def action_chunks(episodes: Sequence[Episode], processor: Processor) -> np.ndarray:
    """Actions (N, H, dim) float32, normalised, of at most STATISTICS evenly chosen ticks of `episodes`."""
    stride = max(1, sum(map(len, episodes)) // STATISTICS)
    return np.concatenate([
        processor.actions(np.asarray(episode.targets[::stride], float), episode.anchor[::stride])
        for episode in episodes
    ])  # fmt: skip


def vocabulary(episodes: Sequence[Episode]) -> tuple[str, ...]:
    """The words of all instructions; empty when they are all the same, since there is nothing to read then."""
    texts = {episode.instruction for episode in episodes}
    return Tokenizer.build(texts) if len(texts) > 1 else ()
