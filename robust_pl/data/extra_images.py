"""Generated images in a file, labelled there or by a teacher."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from .array_file import MappedArray, map_npy, map_npz, write_whole
from .images import EightBitImages

_CHUNK = 1 << 20
IMAGE, LABEL = "image", "label"


class ExtraImages(EightBitImages):
    """8-bit images in a file, mapped into memory, with labels; read like the images of the set that they are added to.

    Args:
        images: uint8 (N, H, W, C) or (N, C, H, W).
        labels: of any integer type, (N,).
        image_shape: (C, H, W) of the set.
        num_classes: of the set.
        augment: maps uint8 (B, C, H, W) and keys (B,) to augmented uint8 images; None leaves them as they are.

    Raises:
        ValueError: if shapes, types or labels do not fit the set.
    """

    def __init__(
        self,
        images: MappedArray,
        labels: MappedArray,
        image_shape: tuple[int, int, int],
        num_classes: int,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.channels_last = check_images(images, image_shape)
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{labels.path} holds labels of type {labels.dtype} and shape {labels.shape} for {len(images)} images: they "
                "must be whole numbers, one an image"
            )
        for start in range(0, len(labels), _CHUNK):
            some = labels.read(slice(start, start + _CHUNK))
            if some.min() < 0 or some.max() >= num_classes:
                raise ValueError(
                    f"{labels.path} holds labels from {some.min()} to {some.max()}: the {num_classes} classes of the data are "
                    f"0 to {num_classes - 1}"
                )
        self.images, self.labels, self.augment, self.white = images, labels, augment, 255
        self.shape = (image_shape[0], image_shape[1], image_shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = pixels(self.images, index.numpy(), self.channels_last)
        return x, torch.from_numpy(self.labels.read(index.numpy()).astype(np.int64))


def open_extra(path: Path) -> tuple[MappedArray, MappedArray | None]:
    """Images, and labels if there are any: a .npz file or a folder with ``image`` and ``label``, or a .npy file of images,
    beside which labels have the same name with ``label`` in place of ``image``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind, damaged, or holds no images.
    """
    if path.suffix == ".npz":
        found = map_npz(path, (IMAGE, LABEL))
        if IMAGE not in found:
            raise ValueError(f"{path} holds no array {IMAGE!r}: write it with numpy.savez(path, image=..., label=...)")
        return found[IMAGE], found.get(LABEL)
    path = path / f"{IMAGE}.npy" if path.is_dir() else path
    if path.suffix != ".npy":
        missing = "must be .npz, .npy, or a folder of image.npy and label.npy" if path.exists() else "does not exist"
        raise (ValueError if path.exists() else FileNotFoundError)(f"extra={str(path)!r} {missing}")
    labels = path.with_name(path.name.replace(IMAGE, LABEL))
    return map_npy(path), map_npy(labels) if labels != path and labels.is_file() else None


def check_images(images: MappedArray, image_shape: tuple[int, int, int]) -> bool:
    """Whether channels come last; refuse what are not 8-bit images of the set's shape."""
    channels, height, width = image_shape
    last = images.shape[1:] == (height, width, channels)
    fits = last or images.shape[1:] == tuple(image_shape)
    if images.dtype != np.uint8 or not fits or not len(images):
        raise ValueError(
            f"{images.path} holds images of type {images.dtype} and shape {images.shape}: the data need uint8 of shape "
            f"(N, {height}, {width}, {channels}) or (N, {channels}, {height}, {width}), 255 being white"
        )
    return last


def pixels(images: MappedArray, index: np.ndarray | slice, channels_last: bool) -> Tensor:
    """Some of the images, uint8 (B, C, H, W)."""
    x = torch.from_numpy(images.read(index))
    return x.permute(0, 3, 1, 2).contiguous() if channels_last else x


def pseudo_labels(
    images: MappedArray,
    teacher: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> MappedArray:
    """The teacher's predictions, made once and kept beside the images under a name of their own for each teacher.

    Args:
        images: uint8 (N, H, W, C) or (N, C, H, W).
        teacher: maps pixels in [0, 1] to logits (B, K).
        image_shape: (C, H, W).
        num_classes: K.
        batch_size: images at once.
        device: where to run it.

    Raises:
        ValueError: if it has another number of classes.
        PermissionError: if they cannot be kept there.
    """
    last = check_images(images, image_shape)
    target = images.path.with_name(f"{images.path.name}.{LABEL}-{_digest(images, teacher)}.npy")
    if target.is_file():
        return map_npy(target)
    labels = np.empty(len(images), np.int64)
    teacher = teacher.to(device).eval()
    with torch.inference_mode():
        for start in track(range(0, len(images), batch_size), "Labelling", transient=True, disable=len(images) < _CHUNK // 16):
            part = slice(start, start + batch_size)
            logits = teacher(pixels(images, part, last).to(device).to(torch.float32).div_(255))
            if logits.shape[1] != num_classes:
                raise ValueError(
                    f"the teacher returns {logits.shape[1]} logits for {num_classes} classes: name one of these data"
                )
            labels[part] = logits.argmax(1).cpu().numpy()
    teacher.cpu()
    content = io.BytesIO()
    np.save(content, labels)
    content.seek(0)
    write_whole(target, content)
    return map_npy(target)


def _digest(images: MappedArray, teacher: nn.Module) -> str:
    """Of the teacher's weights and structure, and of which images these are."""
    digest = hashlib.sha256(f"{images.identity} {images.shape} {teacher}".encode())
    # Not its state dict: a frozen network leaves itself out of that.
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
