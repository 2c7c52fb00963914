"""One page, or one table for papers, over everything that runs measured. Works on plain data."""

from ..._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Analysed": "run",
        "PaperTable": "paper_table",
        "Run": "run",
        "Tested": "run",
        "Viewed": "run",
        "as_page": "page",
        "paper_markdown": "paper_table",
        "paper_tables": "paper_table",
    },
)
