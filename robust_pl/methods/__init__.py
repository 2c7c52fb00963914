"""Training methods: one LightningModule a file."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AFA": "adversarial.afa",
        "AdversarialFineTuning": "adversarial.fine_tuning",
        "Example": "example",
        "FreeAT": "adversarial.free_at",
        "GreedySoup": "averaging.greedy_soup",
        "LearnedSoup": "averaging.learned_soup",
        "MEHLSoup": "averaging.mehl_soup",
        "LayerwiseTWA": "averaging.layerwise_twa",
        "Method": "base",
        "PGDAT": "adversarial.pgd_at",
        "PubDef": "adversarial.pub_def",
        "RiFT": "adversarial.rift",
        "RobustWeightSignature": "averaging.robust_weight_signature",
        "StandardTraining": "natural.standard",
        "UniformSoup": "averaging.uniform_soup",
        "SubspaceAT": "adversarial.subspace_at",
        "TRADES": "adversarial.trades",
        "TWA": "averaging.twa",
        "Schedule": "schedules",
        "MultiStep": "schedules",
        "Cosine": "schedules",
        "OneCycle": "schedules",
        "SlowStartFastDecay": "schedules",
        "TorchSchedule": "schedules",
    },
)
