"""An MP4 of a recorded episode: all cameras side by side, the instruction and the outcome on top."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from vla_teleop.bags import messages

FRAME_RATE = 30
HEIGHT = 360
BANNER = 44


def write_video(bag: Path, cameras: list[str], caption: str, outcome: str, path: Path) -> None:
    """Write `path` from the image topics of `bag`; the last second carries `outcome`.

    Raises:
        ValueError: the bag holds no image of one of the cameras.
    """
    topics = {f"/camera/{camera}/image_raw": camera for camera in cameras}
    frames: dict[str, list[tuple[float, np.ndarray]]] = {camera: [] for camera in cameras}
    for topic, stamp, message in messages(bag, tuple(topics)):
        image = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.width, 3)
        frames[topics[topic]].append((stamp, image))
    for camera, list_ in frames.items():
        if not list_:
            raise ValueError(f"{bag}: expected images of camera {camera}, found none")
    begin = max(f[0][0] for f in frames.values())
    end = min(f[-1][0] for f in frames.values())
    stamps = {camera: np.array([s for s, _ in f]) for camera, f in frames.items()}
    times = np.arange(begin, end, 1.0 / FRAME_RATE)
    with av.open(str(path), "w") as container:
        stream = None
        for k, t in enumerate(times):
            views = []
            for camera, list_ in frames.items():
                image = list_[int(np.argmin(np.abs(stamps[camera] - t)))][1]
                width = round(image.shape[1] * HEIGHT / image.shape[0] / 2) * 2
                view = cv2.resize(image, (width, HEIGHT), interpolation=cv2.INTER_LINEAR)
                cv2.putText(
                    view,
                    camera,
                    (8, HEIGHT - 10),
                    cv2.FONT_HERSHEY_SIMPLEX,
                    0.45,
                    (255, 255, 255),
                    1,
                    cv2.LINE_AA,
                )
                views.append(view)
            picture = np.concatenate(views, axis=1)
            last = times[-1] - t < 1.0
            text = f"{caption}  -  {outcome}" if last else caption
            banner = np.full((BANNER, picture.shape[1], 3), 24, np.uint8)
            colour = (255, 255, 255) if not last else ((120, 255, 120) if outcome == "success" else (255, 140, 120))
            scale = min(0.7, 0.7 * (picture.shape[1] - 150) / (14.0 * max(len(text), 1)))
            cv2.putText(banner, text, (10, 29), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
            clock = f"{t - begin:5.1f} s"
            cv2.putText(
                banner,
                clock,
                (picture.shape[1] - 80, 29),
                cv2.FONT_HERSHEY_SIMPLEX,
                0.55,
                (180, 180, 180),
                1,
                cv2.LINE_AA,
            )
            picture = np.concatenate([banner, picture], axis=0)
            if stream is None:
                stream = container.add_stream("libx264", rate=FRAME_RATE)
                stream.width, stream.height = picture.shape[1], picture.shape[0]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "23", "preset": "veryfast"}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, FRAME_RATE)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))
