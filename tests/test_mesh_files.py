"""Meshes: their geometry against numbers by hand, files of every format that the tests write themselves, and bad ones."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import Mesh, MeshRasterizer, load_mesh
from robust_pl.scenes.mesh import smooth_normals

MESHES = Path(os.environ.get("ROBUST_PL_DATA", "data")) / "multiview" / "meshes"
CORNERS = torch.tensor([[0.0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]])
SQUARE = torch.tensor([[0, 1, 2], [0, 2, 3]])
QUARTERS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]  # upper left, upper right, lower left, lower right

OBJ = """mtllib square.mtl
v 0 0 0
v 2 0 0
v 2 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl painted
f 1/1 2/2 3/3 4/4
"""
MTL = "newmtl painted\nKd 0.2 0.2 0.2\nmap_Kd four colours.png\nnewmtl unused\nmap_Kd gone.png\n"


def of(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(torch.from_numpy(np.array(shape.vertices)), torch.from_numpy(np.array(shape.faces)))


def four_colours() -> Image.Image:
    return Image.fromarray(np.array(QUARTERS, dtype=np.uint8).reshape(2, 2, 3)).resize((8, 8), Image.Resampling.NEAREST)


def write_obj(folder: Path, obj: str = OBJ, mtl: str = MTL) -> Path:
    (folder / "square.obj").write_text(obj)
    (folder / "square.mtl").write_text(mtl)
    four_colours().save(folder / "four colours.png")
    return folder / "square.obj"


def seen(mesh: Mesh, view: tuple[float, ...] = (0, 0, 90, 4, 0, 0)) -> Tensor:
    """The four quarters of a square as it is seen, upper left first, 0 to 255."""
    renderer = MeshRasterizer(mesh, (64, 64), ambient=1.0, directional=0.0)
    rgb, alpha = (part[0] for part in renderer.render(camera_to_world(torch.tensor([view]))))
    rows, columns = (alpha[0].amax(k).nonzero().squeeze(1) for k in (1, 0))
    y, x = ([side[len(side) // 5], side[4 * len(side) // 5]] for side in (rows, columns))
    return torch.stack([rgb[:, i, j] for i in y for j in x]).mul(255).round().int()


def test_an_obj_with_its_material(tmp_path: Path) -> None:
    """The picture stands upright on the square, the space in its name is no matter, and Kd does not darken it."""
    mesh = load_mesh(write_obj(tmp_path))
    assert len(mesh.faces) == 2 and mesh.texture_of_face.tolist() == [0, 0]
    half = torch.tensor([2.0, 1.0]) / math.sqrt(5)
    torch.testing.assert_close(mesh.vertices.amax(0), torch.tensor([half[0], 0.0, half[1]]))
    torch.testing.assert_close(mesh.vertices.amin(0), -torch.tensor([half[0], 0.0, half[1]]))
    torch.testing.assert_close(mesh.normals, torch.tensor([0.0, -1, 0]).expand(2, 3, 3))  # it faces -y
    assert seen(mesh).tolist() == QUARTERS


def test_place_and_axes_as_in_the_file(tmp_path: Path) -> None:
    mesh = load_mesh(write_obj(tmp_path), up="z", radius=None)
    torch.testing.assert_close(mesh.vertices[mesh.faces].sum((0, 1)), CORNERS[SQUARE].sum((0, 1)))
    torch.testing.assert_close(mesh.normals, torch.tensor([0.0, 0, 1]).expand(2, 3, 3))
    assert seen(load_mesh(tmp_path / "square.obj", up="z"), (0, 0, 0, 4, 0, 0)).tolist() == QUARTERS


def test_an_obj_with_two_materials(tmp_path: Path) -> None:
    """One has a picture, the other a colour."""
    obj = OBJ + "v 0 2 0\nv 2 2 0\nusemtl plain\nf 4 3 6 5\n"
    mesh = load_mesh(write_obj(tmp_path, obj, MTL + "newmtl plain\nKd 0.0 0.6 1.0\n"))
    assert sorted(mesh.texture_of_face.tolist()) == [-1, -1, 0, 0]
    plain = mesh.colors[mesh.texture_of_face < 0]
    torch.testing.assert_close(plain, torch.tensor([0.0, 0.6, 1.0]).expand(2, 3, 3))


def test_normals_of_the_file_are_kept(tmp_path: Path) -> None:
    normal = torch.tensor([0.0, 0.6, 0.8])
    trimesh.Trimesh(CORNERS, SQUARE, vertex_normals=normal.expand(4, 3), process=False).export(
        tmp_path / "square.ply", vertex_normal=True
    )
    torch.testing.assert_close(load_mesh(tmp_path / "square.ply").normals, normal.expand(2, 3, 3))


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_a_ply_with_colours(tmp_path: Path, encoding: str) -> None:
    colors = np.array([[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255], [51, 102, 153, 255]], dtype=np.uint8)
    trimesh.Trimesh(CORNERS, SQUARE, vertex_colors=colors, process=False).export(tmp_path / "square.ply", encoding=encoding)
    mesh = load_mesh(tmp_path / "square.ply", radius=None)
    torch.testing.assert_close(mesh.vertices, CORNERS)
    torch.testing.assert_close(mesh.colors, torch.from_numpy(colors)[SQUARE][..., :3] / 255)


def test_a_ply_with_polygons_and_colours_of_faces(tmp_path: Path) -> None:
    header = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\nelement face 1\n"
    header += "property list uchar int vertex_indices\nend_header\n"
    (tmp_path / "quad.ply").write_text(header + "0 0 0\n2 0 0\n2 1 0\n0 1 0\n4 0 1 2 3\n")
    assert len(load_mesh(tmp_path / "quad.ply").faces) == 2
    faces = np.array([[10, 20, 30, 255], [40, 50, 60, 255]], dtype=np.uint8)
    trimesh.Trimesh(CORNERS, SQUARE, face_colors=faces, process=False).export(tmp_path / "faces.ply")
    torch.testing.assert_close(load_mesh(tmp_path / "faces.ply").colors[:, 1], torch.from_numpy(faces)[:, :3] / 255)


@pytest.mark.parametrize("name", ["scene.glb", "scene.gltf"])
def test_gltf_with_several_parts_that_are_moved(tmp_path: Path, name: str) -> None:
    """A painted square twice, once mirrored, and a plain one: pictures are shared, and mirrored faces still look outwards."""
    uv = [[0, 0], [1, 0], [1, 1], [0, 1]]
    picture = trimesh.visual.material.PBRMaterial(baseColorTexture=four_colours(), baseColorFactor=[255, 255, 255, 255])
    painted = trimesh.Trimesh(CORNERS, SQUARE, visual=trimesh.visual.TextureVisuals(uv=uv, material=picture), process=False)
    plain = trimesh.Trimesh(CORNERS, SQUARE, process=False)
    plain.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=[55, 0, 255, 255])
    )
    scene = trimesh.Scene()
    scene.add_geometry(painted, node_name="left")
    scene.add_geometry(painted, node_name="right", geom_name="painted", transform=np.diag([-1.0, 1, 1, 1]))
    scene.add_geometry(plain, node_name="up", transform=trimesh.transformations.translation_matrix([0, 0, 5]))
    written = {"model.gltf": scene.export(file_type="glb")} if name == "scene.glb" else scene.export(file_type="gltf")
    for part, content in written.items():
        (tmp_path / (name if part == "model.gltf" else part)).write_bytes(content)
    mesh = load_mesh(tmp_path / name, radius=None)
    assert len(mesh.faces) == 6
    corners = mesh.vertices[mesh.faces]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (normal[:, 1] < 0).all()  # +z of glTF is -y
    torch.testing.assert_close(mesh.vertices.amin(0), torch.tensor([-2.0, -5, 0]))
    torch.testing.assert_close(mesh.vertices.amax(0), torch.tensor([2.0, 0, 1]))
    bare = mesh.colors[mesh.texture_of_face < 0]
    expected = torch.tensor([(55 / 255) ** (1 / 2.2), 0.0, 1.0])  # linear light
    torch.testing.assert_close(bare, expected.expand(2, 3, 3), atol=1e-5, rtol=0)
    assert len(mesh.textures) == 1
    for side, colors in ((corners[..., 0] >= 0, QUARTERS), (corners[..., 0] <= 0, [QUARTERS[k] for k in (1, 0, 3, 2)])):
        these = side.all(1) & (mesh.texture_of_face == 0)
        part = Mesh(corners[these].view(-1, 3), torch.arange(6).view(2, 3), uv=mesh.uv[these], textures=mesh.textures)
        assert seen(part.fitted()).tolist() == colors


def test_gltf_multiplies_colours_of_vertices_with_the_material(tmp_path: Path) -> None:
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 51, 255, 255])
    visual = trimesh.visual.TextureVisuals(uv=np.zeros((4, 2)), material=material)
    colors = np.array([[255, 255, 255, 255], [255, 255, 0, 255], [0, 255, 0, 255], [102, 255, 102, 255]], dtype=np.uint8)
    visual.vertex_attributes["color"] = colors
    trimesh.Trimesh(CORNERS, SQUARE, visual=visual, process=False).export(tmp_path / "square.glb")
    mesh = load_mesh(tmp_path / "square.glb")
    expected = (torch.from_numpy(colors)[:, :3] / 255 * torch.tensor([1.0, 0.2, 1.0])) ** (1 / 2.2)
    torch.testing.assert_close(mesh.colors, expected[mesh.faces])


def test_what_a_closed_mesh_is() -> None:
    box, inverted = trimesh.creation.box(), trimesh.creation.box()
    inverted.invert()
    open_ = Mesh(of(box).vertices, of(box).faces[:-1])
    assert of(box).closed and not of(inverted).closed and not open_.closed
    corners = of(box).vertices[of(box).faces].reshape(-1, 3)  # no vertex is shared, only its place
    assert Mesh(corners, torch.arange(36).view(-1, 3)).closed
    moved = Mesh(of(inverted).vertices + 0.3, of(inverted).faces)
    assert not Mesh.joined([of(box), moved]).closed and Mesh.joined([of(box), of(trimesh.creation.torus(3, 1))]).closed


def test_smooth_normals_keep_edges() -> None:
    box = of(trimesh.creation.box())
    corners = box.vertices[box.faces]
    flat = torch.nn.functional.normalize(
        torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=-1
    )
    torch.testing.assert_close(smooth_normals(box.vertices, box.faces), flat.unsqueeze(1).expand(-1, 3, -1))
    ball = of(trimesh.creation.icosphere(subdivisions=3))
    torch.testing.assert_close(ball.normals, ball.vertices[ball.faces], atol=0.02, rtol=0)
    given = Mesh(box.vertices, box.faces, normals=torch.zeros(8, 3))
    torch.testing.assert_close(given.normals, box.normals)


def test_fitted_and_turned() -> None:
    mesh = Mesh(CORNERS, SQUARE)
    fitted = mesh.fitted(3.0)
    assert fitted.radius == pytest.approx(3.0)
    torch.testing.assert_close(fitted.vertices[2], 3 * torch.tensor([2.0, 1, 0]) / math.sqrt(5))
    torch.testing.assert_close(mesh.y_up_to_z_up().vertices[3], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(mesh.y_up_to_z_up().normals[0, 0], torch.tensor([0.0, -1, 0]))
    torch.testing.assert_close(mesh.vertices, CORNERS)


def edited(folder: Path, old: str, new: str) -> Path:
    return write_obj(folder, OBJ.replace(old, new), MTL.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("four colours.png", "gone.png", FileNotFoundError, r"square.obj names the file gone.png, which does not exist"),
        ("mtllib square.mtl", "mtllib gone.mtl", FileNotFoundError, r"names the material file gone.mtl, which does not exist"),
        ("four colours.png", "square.obj", ValueError, r"its picture square.obj cannot be read"),
        ("f 1/1 2/2 3/3 4/4", "", ValueError, r"square.obj: it has no faces"),
        ("v 2 1 0", "v 2 nan 0", ValueError, r"square.obj: vertices of the mesh are not finite"),
        ("vt 1 1", "vt 1 nan", ValueError, r"square.obj: uv of the mesh are not finite"),
        ("f 1/1 2/2 3/3 4/4", "f 1/1 2/2 9/3", ValueError, r"square.obj"),
    ],
)
def test_bad_obj_files(tmp_path: Path, old: str, new: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        load_mesh(edited(tmp_path, old, new))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_mesh(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: give the path of a mesh"):
        load_mesh(tmp_path / "gone.obj")
    (tmp_path / "notes.txt").write_text("v 0 0 0")
    with pytest.raises(ValueError, match=r"notes.txt is no mesh that can be read: give one of .obj"):
        load_mesh(tmp_path / "notes.txt")
    for name in ("noise.ply", "noise.glb", "noise.gltf"):
        (tmp_path / name).write_bytes(b"\x00\x01 nothing of the kind")
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            load_mesh(tmp_path / name)
    with pytest.raises(ValueError, match="up='x'"):
        load_mesh(write_obj(tmp_path), up="x")  # type: ignore[arg-type]
    trimesh.PointCloud(CORNERS).export(tmp_path / "cloud.ply")
    with pytest.raises(ValueError, match=r"cloud.ply: it has no faces"):
        load_mesh(tmp_path / "cloud.ply")
    (tmp_path / "open.gltf").write_text(json.dumps({"asset": {"version": "2.0"}, "images": [{"uri": "gone%20now.png"}]}))
    with pytest.raises(FileNotFoundError, match=r"names the file gone now.png"):
        load_mesh(tmp_path / "open.gltf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vertices": CORNERS[:, :2]}, "vertices of the mesh have the shape"),
        ({"faces": SQUARE[:, :2]}, "faces of the mesh have the shape"),
        ({"faces": SQUARE[:0]}, "the mesh has no faces"),
        ({"faces": SQUARE + 1}, "name vertices outside of 0 to 3"),
        ({"vertices": CORNERS * math.nan}, "vertices of the mesh are not finite"),
        ({"colors": torch.ones(3, 3)}, "colors of the mesh have the shape"),
        ({"normals": torch.full((4, 3), math.inf)}, "normals of the mesh are not finite"),
        ({"textures": [torch.ones(2, 2)]}, r"textures\[0\] has the shape"),
        ({"texture_of_face": torch.tensor([0, 0])}, "texture_of_face must be 2 numbers from -1 to -1"),
    ],
)
def test_wrong_tensors(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mesh(**{"vertices": CORNERS, "faces": SQUARE, **change})  # type: ignore[arg-type]


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="radius=0"):
        Mesh(CORNERS, SQUARE).fitted(0)
    with pytest.raises(ValueError, match="one point"):
        Mesh(CORNERS * 0, SQUARE).fitted()
    with pytest.raises(ValueError, match="no mesh to join"):
        Mesh.joined([])


@pytest.mark.skipif(not MESHES.is_dir(), reason="ROBUST_PL_DATA holds no multiview/meshes")
@pytest.mark.parametrize(
    ("name", "faces"), [("spot_triangulated.obj", 5856), ("Duck.glb", 4212), ("CesiumMilkTruck.glb", 3624)]
)
def test_real_meshes(name: str, faces: int) -> None:
    """Upright, textured, without holes: what is seen from all sides is one piece without gaps inside."""
    from scipy.ndimage import binary_fill_holes

    mesh = load_mesh(MESHES / name)
    assert len(mesh.faces) == faces and mesh.radius == pytest.approx(1.0, abs=1e-5) and len(mesh.textures) == 1
    view = torch.zeros(8, 6)
    view[:, 1], view[:, 2], view[:, 3] = torch.arange(8) * 45.0, 60.0, 4.0
    views = MeshRasterizer(mesh, (96, 96), ambient=1.0, directional=0.0).render(camera_to_world(view))
    if mesh.closed:
        for alpha in views.alpha[:, 0].bool().numpy():
            missing = binary_fill_holes(alpha) & ~alpha
            assert missing.sum() == 0 or missing.sum() > 3  # a crack would be a pixel or two
    color = views.rgb.sum((0, 2, 3)) / views.alpha.sum()
    expected = {
        "spot_triangulated.obj": (0.72, 0.66, 0.64),
        "Duck.glb": (0.9, 0.75, 0.05),
        "CesiumMilkTruck.glb": (0.75, 0.77, 0.75),
    }
    torch.testing.assert_close(color, torch.tensor(expected[name]), atol=0.2, rtol=0)
    if name == "Duck.glb":  # the head is smaller than the body
        assert views.alpha[:, :, :48].sum() < views.alpha[:, :, 48:].sum()
