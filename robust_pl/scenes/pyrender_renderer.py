"""Meshes rendered by OpenGL through pyrender, without a screen."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mesh import Mesh
from .renderer import Views, focal_length


class PyrenderRenderer:
    """A :class:`Mesh` rendered by pyrender (extra ``pyrender``) in EGL, on the graphics card or by Mesa in software.

    Lights are those of :class:`MeshRasterizer`, but pyrender adds them in linear light, which leaves shaded sides brighter, and
    its rough surface reflects a little less at grazing angles. Edges are smoothed by four samples, images have 8 bits. Poses
    are rendered one after the other, and what comes back from OpenGL is copied to their device.

    Args:
        mesh: what is seen; faces with a texture take the mean of their colours times the texture.
        image_size: see :class:`MeshRasterizer`, and so all others.
        fov_x: horizontal field of view in degrees.
        ambient: light from everywhere.
        directional: light from one side.
        light: where that comes from.

    Raises:
        ImportError: without pyrender.
        OSError: without EGL.
        ValueError: for a field of view outside of (0, 180).
    """

    differentiable = False

    def __init__(
        self,
        mesh: Mesh,
        image_size: tuple[int, int] = (224, 224),
        fov_x: float = 39.6,
        *,
        ambient: float = 0.5,
        directional: float = 0.5,
        light: tuple[float, float, float] = (0.4, -0.5, 0.8),
    ) -> None:
        self.mesh, self.image_size, self.fov_x = mesh, image_size, fov_x
        self.ambient, self.directional, self.light = ambient, directional, light
        height, width = image_size
        focal = focal_length(fov_x, width)
        pyrender = self._pyrender = _import()
        self._scene = pyrender.Scene(bg_color=np.zeros(4), ambient_light=np.full(3, float(ambient)))
        self._scene.add(_pyrender_mesh(pyrender, mesh))
        # A light shines along its own -z; pyrender divides colours by pi.
        sun = pyrender.DirectionalLight(color=np.ones(3), intensity=np.pi * directional)
        self._scene.add(sun, pose=_turned_to(np.array(light, dtype=np.float64)))
        camera = pyrender.IntrinsicsCamera(focal, focal, width / 2, height / 2, znear=1e-3, zfar=1e3)
        self._camera = self._scene.add(camera, pose=np.eye(4))
        try:
            self._screen = pyrender.OffscreenRenderer(width, height)
        except Exception as error:  # whatever OpenGL runs into
            raise OSError(f"pyrender cannot draw without a screen: install EGL (Mesa's libegl1) ({error})") from error

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds the mesh."""
        return self.mesh.radius

    def fingerprint(self) -> str:
        """Sum of the mesh, all arguments and pyrender's version; the driver of the graphics card is not known."""
        what = (self._pyrender.__version__, self.mesh.fingerprint(), *self.image_size, self.fov_x, self.ambient)
        text = repr(("PyrenderRenderer 1", *what, self.directional, *self.light))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device."""
        height, width = self.image_size
        flags = self._pyrender.RenderFlags.RGBA | self._pyrender.RenderFlags.SKIP_CULL_FACES
        images = np.empty((len(pose), height, width, 4), dtype=np.uint8)
        for image, matrix in zip(images, pose.detach().cpu().double().numpy(), strict=True):
            self._scene.set_pose(self._camera, matrix)
            image[:] = self._screen.render(self._scene, flags)[0]
        views = torch.from_numpy(images).to(pose.device).permute(0, 3, 1, 2).float() / 255
        return Views(views[:, :3].contiguous(), views[:, 3:].contiguous())


def _import() -> Any:
    os.environ.setdefault("PYOPENGL_PLATFORM", "egl")  # read once, when OpenGL is imported
    try:
        import pyrender
    except ImportError as error:
        raise ImportError(
            f"PyrenderRenderer needs pyrender and EGL: pip install 'robust_pl[pyrender]', and Mesa's libegl1 ({error})"
        ) from error
    return pyrender


def _pyrender_mesh(pyrender: Any, mesh: Mesh) -> Any:
    """A primitive for each texture, whose corners share no vertices."""
    primitives = []
    for number in mesh.texture_of_face.unique().tolist():
        these = mesh.texture_of_face == number
        corners, colors = mesh.vertices[mesh.faces[these]].view(-1, 3), mesh.colors[these].view(-1, 3) ** 2.2  # linear light
        material: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0, "doubleSided": True}
        content: dict[str, Any] = {"positions": corners, "normals": mesh.normals[these].reshape(-1, 3)}
        if number >= 0:
            picture = (mesh.textures[number] * 255).round().byte().cpu().numpy()
            material["baseColorTexture"] = pyrender.Texture(source=picture, source_channels="RGB")
            material["baseColorFactor"] = [*colors.mean(0).tolist(), 1.0]
            content["texcoord_0"] = mesh.uv[these].reshape(-1, 2)
        else:
            content["color_0"] = torch.cat([colors, torch.ones_like(colors[:, :1])], 1)
        arrays = {name: tensor.cpu().numpy() for name, tensor in content.items()}
        primitives.append(pyrender.Primitive(**arrays, material=pyrender.MetallicRoughnessMaterial(**material), mode=4))
    made = pyrender.Mesh(primitives)
    # pyrender finds these with a name that numpy 2 no longer has.
    made._bounds = np.stack([mesh.vertices.amin(0).cpu().numpy(), mesh.vertices.amax(0).cpu().numpy()])
    return made


def _turned_to(direction: np.ndarray) -> np.ndarray:
    """A pose (4, 4) whose z axis shows into a direction."""
    z = direction / np.linalg.norm(direction)
    x = np.cross([0.0, 1.0, 0.0] if abs(z[1]) < 0.9 else [1.0, 0.0, 0.0], z)
    x /= np.linalg.norm(x)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([x, np.cross(z, x), z], 1)
    return pose
