"""What was measured, for people and for leaderboards: tables, pictures, Markdown, JSON. Works on plain data."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Classes": "classes",
        "Curve": "curve",
        "HeatMap": "record",
        "Line": "summary",
        "Lines": "record",
        "Record": "record",
        "Sheet": "record",
        "Table": "table",
        "ViewBins": "view_bins",
        "as_markdown": "markdown",
        "count_classes": "classes",
        "draw_contact_sheet": "contact_sheet",
        "draw_corruption_sheet": "corruption_sheet",
        "interval": "wilson",
        "mixture_components": "view_components",
        "model_info": "robustbench_info",
        "plot_classes": "class_bars",
        "plot_curves": "plots",
        "plot_record": "record_plot",
        "plot_summary": "plots",
        "plot_view_sphere": "view_sphere",
        "shift_record": "shift_table",
        "summarise": "summary",
        "worst_images": "worst",
        "worst_samples": "worst",
        "write_report": "write",
        "write_turntable": "turntable",
        "write_viewpoint_report": "viewpoint_report",
    },
)
