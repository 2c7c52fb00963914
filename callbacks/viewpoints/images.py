"""Extreme views as an evaluation folder: images in class folders, and a table that says where each was taken.

::

    views/<class>/<number>_<object>_<sample>.png    fresh views from the found distributions
    worst/<class>/<number>_<object>.png             the worst view of each object
    views.csv                                       one row an image
    views.json                                      the attack's settings, and all that the rows share
    distribution.safetensors                        from which the views were drawn

:class:`robust_pl.data.ViewImages` reads it. A row holds ``file``; ``kind``, ``sample`` or ``worst``; ``object``; ``label``;
``prediction`` and ``loss`` of the rendered pixels, before they were rounded to 8 bits; the viewpoint ``gamma``, ``theta`` and
``phi`` in degrees, ``r``, ``x`` and ``y`` in units of the scene; ``u_<parameter>``, the unbounded number of each active one;
``sample`` and ``seed``: it is view number ``sample`` of ``distribution.sample(samples, seed)``, empty for the worst; and
``renderer``, its fingerprint.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ... import __version__
from ...scenes.scene_set import SceneSet
from ...scenes.view_space import NAMES
from ..store.files import replacing, write, write_json
from .distribution import space_record
from .found import Found

TABLE, ABOUT = "views.csv", "views.json"
_AT_ONCE = 64


def write_views(
    found: Found,
    scenes: SceneSet,
    folder: Path,
    class_names: Sequence[str] | None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> None:
    """Render the fresh and the worst views of this process's share of the objects once more, and write them as PNGs.

    Args:
        found: what an attack found.
        scenes: the objects that it attacked.
        folder: where.
        class_names: by label, to name the folders; None takes the numbers.
        rank: of this process.
        world_size: number of processes.
        device: that renders; where the attack did, the pixels are those that the network saw.
    """
    folder = Path(folder)
    for number in range(rank, len(found.ids), world_size):
        files = list(_files(found, number, class_names))
        views = torch.cat([found.view[number], found.worst_view[number : number + 1]])
        for begin in range(0, len(views), _AT_ONCE):
            part = views[begin : begin + _AT_ONCE].to(device)
            images = found.images(scenes, torch.full((len(part),), number, device=device), part)
            for file, image in zip(files[begin : begin + _AT_ONCE], images, strict=True):
                _save(image, folder / file)


def write_table(found: Found, scenes: SceneSet, folder: Path, class_names: Sequence[str] | None) -> None:
    """Write what is known of each image; the last step, so that a folder with a table is whole."""
    space = found.distribution.space
    columns = ["file", "kind", "object", "label", "prediction", "loss", *NAMES]
    columns += [*(f"u_{name}" for name in space.active), "sample", "seed", "renderer"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    samples = found.u.shape[1]
    u = torch.cat([found.u, found.worst_u.unsqueeze(1)], 1)
    view, loss = space.squash(u), torch.cat([found.loss, found.worst_loss.unsqueeze(1)], 1)
    prediction = torch.cat([found.prediction, found.worst_prediction.unsqueeze(1)], 1)
    for number, name in enumerate(found.ids):
        sum_of_renderer = scenes.renderers[number].fingerprint()
        for sample, file in enumerate(_files(found, number, class_names)):
            fresh = sample < samples
            row: list[Any] = [file, "sample" if fresh else "worst", name, found.labels[number].item()]
            row += [prediction[number, sample].item(), _number(loss[number, sample])]
            row += [_number(value) for value in (*view[number, sample], *u[number, sample])]
            writer.writerow([*row, *((sample, found.sample_seed) if fresh else ("", "")), sum_of_renderer])
    about = {
        "attack": found.settings,
        "space": space_record(space),
        "samples": samples,
        "renderers": sorted({type(renderer).__name__ for renderer in scenes.renderers}),
        "robust_pl": __version__,
        "image_size": list(scenes.image_size),
        "background": "bank" if isinstance(scenes.background, Tensor) else scenes.background,
        "class_names": None if class_names is None else list(class_names),
        "objects": len(found.ids),
        "renders": found.renders,
    }
    write_json(Path(folder) / ABOUT, about)
    write(Path(folder) / TABLE, text.getvalue().encode())


def _files(found: Found, number: int, class_names: Sequence[str] | None) -> Iterator[str]:
    """Files of an object's fresh views, and of its worst."""
    label, width = int(found.labels[number]), len(str(len(found.ids) - 1))
    group = _plain(class_names[label]) if class_names is not None else f"{label:04d}"
    name = f"{number:0{width}d}_{_plain(found.ids[number])}"
    for sample in range(found.u.shape[1]):
        yield f"views/{group}/{name}_{sample:03d}.png"
    yield f"worst/{group}/{name}.png"


def _plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._") or "_"


def _number(value: Tensor) -> str:
    """Nine digits hold a float32 exactly."""
    return f"{value.item():.9g}"


def _save(image: Tensor, path: Path) -> None:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
