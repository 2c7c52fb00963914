"""Scenes that can be rendered from any viewpoint, and the viewpoints."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "GaussianSplats": "gaussian_splats",
        "Mesh": "mesh",
        "MeshRasterizer": "rasterizer",
        "MitsubaRenderer": "mitsuba_renderer",
        "PyrenderRenderer": "pyrender_renderer",
        "RadianceField": "field",
        "Renderer": "renderer",
        "SceneSet": "scene_set",
        "SOLIDS": "solids",
        "ViewSpace": "view_space",
        "Views": "renderer",
        "load_mesh": "mesh_files",
        "make_solid": "solids",
        "natural_space": "natural",
    },
)
