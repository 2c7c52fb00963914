"""Training methods: one LightningModule a file."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdversarialFineTuning": "adversarial.fine_tuning",
        "Example": "example",
        "FreeAT": "adversarial.free_at",
        "Method": "base",
        "PGDAT": "adversarial.pgd_at",
        "StandardTraining": "natural.standard",
        "TRADES": "adversarial.trades",
        "Schedule": "schedules",
        "MultiStep": "schedules",
        "Cosine": "schedules",
        "OneCycle": "schedules",
        "SlowStartFastDecay": "schedules",
        "TorchSchedule": "schedules",
    },
)
