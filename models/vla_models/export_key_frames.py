"""The graphs of a policy that imagines (`parts.key_frames.KeyFramePolicy`):

    encoder.onnx  tokens -> text                                  (rows: the instruction and, with guidance, none)
    first.onnx    image_<camera> (one picture) -> latents, memory_0, ...
    next.onnx     image_<camera> (those of one latent frame), memory_0, ... -> latents, later_0, ...
    write.onnx    latents, actions, text, cache, turns, masks, kept -> written
    video.onnx    latents, share, text, cache, turn, mask -> velocity, imagined
    action.onnx   actions, share, text, cache, imagined, turn, mask -> velocity

Shapes are static: a chunk has F frames, and the cache as many places as the window has tokens. Masks (1, n) say which
places are seen, and which tokens after them are real; turns are rotary embeddings of where they are in the episode,
which grows without end. `written` is the cache for the next chunk: the tokens `kept` of the cache and of what was seen
and done, so that nothing imagined gets into it, and it never leaves the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vla_models.export import GraphSource, Head


class KeyFrameHead(Head):
    """See the module; driven by vla_models.runtime_key_frames."""

    driver = "key_frames"

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.network.loop)

    def sources(self) -> list[GraphSource]:
        network, loop, spec = self.network, self.network.loop, self.spec
        cameras = [f"image_{camera}" for camera in spec.cameras]

        def encode(tokens: Tensor) -> tuple[Tensor, ...]:
            return (network.read(tokens),)

        def first(**values: Tensor) -> tuple[Tensor, ...]:
            latents, memory = network.see(tuple(values[camera] for camera in cameras))
            return latents, *(value for of_one in memory for value in of_one)

        def later(**values: Tensor) -> tuple[Tensor, ...]:
            memory = [values[name] for name in names]
            each = len(memory) // len(cameras)
            past = tuple(tuple(memory[n * each : (n + 1) * each]) for n in range(len(cameras)))
            latents, memory = network.see(tuple(values[camera] for camera in cameras), past)
            return latents, *(value for of_one in memory for value in of_one)

        def write(latents: Tensor, actions: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            turns, sees = ((values[f"video_{name}"], values[f"action_{name}"]) for name in ("turn", "sees"))
            own = network.write(latents, actions, values["text"], turns, values["cache"], sees)
            return (torch.cat([values["cache"], own], 4).index_select(4, values["kept"]),)

        def video(latents: Tensor, share: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            return network.imagine(
                latents, share, values["text"], values["video_turn"], values["cache"], values["video_sees"]
            )

        def action(actions: Tensor, share: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            past = torch.cat([values["cache"][:1], values["imagined"]], 4)
            turn, sees = values["action_turn"], values["action_sees"]
            return network.action(actions, share, values["text"][:1], turn, past, sees)[:1]

        tokens = self.example()["tokens"].repeat(1 + loop.guided, 1)
        start = {name: torch.rand(1, 3, 1, *size, generator=self.generator)
                 for name, size in zip(cameras, spec.cameras.values(), strict=True)}  # fmt: skip
        with torch.no_grad():
            (text,), (seen, *memory) = encode(tokens), first(**start)
        names = [f"memory_{n}" for n in range(len(memory))]
        after = {name: value.expand(-1, -1, loop.pictures, -1, -1).contiguous() for name, value in start.items()}
        after |= dict(zip(names, memory, strict=True))
        latents, actions = (self.normal(1, loop.frames, *shape)
                            for shape in (seen.shape[2:], (loop.frame_actions, loop.width)))  # fmt: skip
        places, values = self.places(text), {"text": text, "latents": latents, "actions": actions}
        imagined = places["cache"][:1, ..., : loop.frames * loop.tokens, :].contiguous()
        values |= places | {"imagined": imagined, "share": torch.rand(1, loop.frames, generator=self.generator)}

        def these(*chosen: str) -> dict[str, Tensor]:
            return {name: values[name] for name in chosen}

        video_places, action_places = ("video_turn", "video_sees"), ("action_turn", "action_sees")
        return [
            GraphSource("encoder", encode, {"tokens": tokens}, ("text",)),
            GraphSource("first", first, start, ("latents", *names)),
            GraphSource("next", later, after, ("latents", *(f"later_{n}" for n in range(len(memory))))),
            GraphSource("write", write, these("latents", "actions", "text", "cache", *video_places, *action_places,
                                              "kept"), ("written",)),
            GraphSource("video", video, these("latents", "share", "text", "cache", *video_places),
                        ("velocity", "imagined")),
            GraphSource("action", action, these("actions", "share", "text", "cache", "imagined", *action_places),
                        ("velocity",)),
        ]  # fmt: skip

    def places(self, text: Tensor) -> Mapping[str, Tensor]:
        """An example of a cache of which half is filled, and where the tokens of a chunk are."""
        loop, slots = self.network.loop, self.network.loop.window
        rows, layers, two, heads, _, size = text.shape
        video = loop.frames * loop.tokens
        whole = video + loop.frames * loop.frame_actions
        turns = (torch.from_numpy(turn) for turn in loop.turns(loop.frames, 3))
        sees = (torch.from_numpy(loop.sees(slots, slots // 2, torch.ones(count, dtype=torch.bool).numpy()))
                for count in (video, whole))  # fmt: skip
        values = dict(zip(("video_turn", "action_turn", "video_sees", "action_sees"), (*turns, *sees), strict=True))
        return values | {
            "cache": self.normal(rows, layers, two, heads, slots, size),
            "kept": torch.arange(whole, slots + whole),
        }
