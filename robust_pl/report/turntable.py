"""A scene that turns once around itself, as GIF or MP4."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..scenes.orbit import distance_to_see, orbit
from ..scenes.renderer import Renderer
from .pictures import picture

FORMATS = (".gif", ".mp4")
_AT_ONCE = 8
_SAMPLE = 96


def write_turntable(
    renderer: Renderer,
    path: str | Path,
    *,
    elevation: float = 20.0,
    frames: int = 48,
    fps: int = 12,
    size: int | None = None,
    distance: float | None = None,
    background: float = 1.0,
    device: torch.device | str = "cpu",
) -> Path:
    """Write a film of a scene seen from all around; the same scene gives the same file on one machine, byte for byte as GIF.

    A GIF has 256 colours, the same in all frames, without dithering, which would flicker. An MP4 (H.264) needs the extra
    ``video``. Cost: ``frames`` renders.

    Args:
        renderer: the scene.
        path: of the file to write, ``.gif`` or ``.mp4``.
        elevation: of the camera, in degrees above the horizon.
        frames: of one turn; azimuth 0 is the first.
        fps: frames a second; a GIF rounds the time of a frame to hundredths.
        size: width of the film in pixels; None takes that of the renderer's images, which is best.
        distance: of the camera from the origin; None takes one from which the sphere that holds the scene fills nine tenths.
        background: a grey value in [0, 1].
        device: where the renderer works.

    Raises:
        ValueError: if an argument is out of range, the file is of another format, or the camera would stand inside the scene.
        ImportError: if an MP4 is asked for and the extra is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} is no film that can be written: name a {' or '.join(FORMATS)} file")
    for name, value, least in (("frames", frames, 1), ("fps", fps, 1), ("size", size, 16)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not -90 <= elevation <= 90:
        raise ValueError(f"elevation={elevation} must lie in [-90, 90] degrees")
    if not 0 <= background <= 1:
        raise ValueError(f"background={background} is a grey value: choose from [0, 1]")
    radius = renderer.radius
    if distance is not None and distance <= radius:
        raise ValueError(f"distance={distance:g} lies inside the scene, which reaches {radius:g} from the origin: choose more")
    if distance is None:
        distance = distance_to_see(radius, renderer.fov_x, renderer.image_size)
    write = _write_gif if path.suffix.lower() == ".gif" else _mp4_writer()
    azimuth = torch.arange(frames, dtype=torch.float32, device=device) * (360 / frames)
    poses = orbit(azimuth, torch.full_like(azimuth, elevation), distance)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(_pictures(renderer, poses, size, background), unfinished, fps)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@torch.no_grad()
def _pictures(renderer: Renderer, poses: Tensor, size: int | None, background: float) -> Iterator[Image.Image]:
    height, width = renderer.image_size
    scaled = None if size is None else (size, round(size * height / width))
    for part in poses.split(_AT_ONCE):
        for image in renderer.render(part).over(background).cpu():
            drawn = picture(image)
            yield drawn if scaled is None else drawn.resize(scaled, Image.Resampling.LANCZOS)


def _write_gif(pictures: Iterator[Image.Image], path: Path, fps: int) -> None:
    drawn = list(pictures)
    few = [image.resize((_SAMPLE, _SAMPLE)) for image in drawn[:: max(1, len(drawn) // 16)]]
    sample = Image.new("RGB", (_SAMPLE, _SAMPLE * len(few)))
    for number, image in enumerate(few):
        sample.paste(image, (0, _SAMPLE * number))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = (_indexed(image, palette, drawn[0].getpixel((0, 0))) for image in drawn)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=max(1, round(100 / fps)) * 10, loop=0)


def _indexed(image: Image.Image, palette: Image.Image, background: object) -> Image.Image:
    """The picture in the colours of another, but for the background, which keeps its own: a mean of near ones would show."""
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    nearest = np.abs(colors - np.array(background)).sum(1).argmin()
    colors[nearest] = background
    index = np.array(image.quantize(palette=palette, dither=Image.Dither.NONE))
    index[(np.asarray(image) == np.array(background)).all(2)] = nearest
    found = Image.fromarray(index)
    found.putpalette(colors.ravel().tolist())
    return found


def _mp4_writer() -> Callable[[Iterator[Image.Image], Path, int], None]:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise ImportError("an MP4 needs imageio-ffmpeg: pip install 'robust_pl[video]', or write a .gif") from error

    def write(pictures: Iterator[Image.Image], path: Path, fps: int) -> None:
        first = next(pictures)
        # Two: H.264 with halved colours has no odd sides.
        film = write_frames(
            str(path), first.size, fps=fps, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error"
        )
        film.send(None)
        try:
            for image in chain([first], pictures):
                film.send(image.tobytes())
        finally:
            film.close()

    return write
