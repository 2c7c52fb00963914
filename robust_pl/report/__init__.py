"""What was measured, for people and for leaderboards: tables, pictures, Markdown, JSON. Works on plain data."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Classes": "classes",
        "Curve": "curve",
        "Line": "summary",
        "Table": "table",
        "as_markdown": "markdown",
        "count_classes": "classes",
        "interval": "wilson",
        "model_info": "robustbench_info",
        "plot_classes": "class_bars",
        "plot_curves": "plots",
        "plot_summary": "plots",
        "summarise": "summary",
        "worst_images": "worst",
        "worst_samples": "worst",
        "write_report": "write",
    },
)
