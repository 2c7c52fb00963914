"""Training methods: one LightningModule a file."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Example": "example",
        "Method": "base",
        "PGDAT": "adversarial.pgd_at",
        "StandardTraining": "natural.standard",
        "TRADES": "adversarial.trades",
        "Schedule": "schedules",
        "MultiStep": "schedules",
        "Cosine": "schedules",
        "OneCycle": "schedules",
        "TorchSchedule": "schedules",
    },
)
