"""LP-FT: the head against scikit-learn's regressions and by hand, what fine-tuning leaves alone, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from sklearn.linear_model import LogisticRegression
from torch import nn

from robust_pl.callbacks import FGSM
from robust_pl.data import DigitsDataModule
from robust_pl.methods import LPFT
from robust_pl.methods.natural.lp_ft import STRENGTHS, regressions
from robust_pl.nets import SmallCNN

from .conftest import CONFIGS
from .test_soups import QUIET

FEW = [1e-3, 0.03, 1.0]


def net(width: int = 4) -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(width=width)


def without_bias() -> SmallCNN:
    built = net()
    built.head.bias = None
    return built


class AtStart(Callback):
    """The network's tensors as training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.state = {name: t.clone() for name, t in pl_module.net.state_dict().items()}


def fit(method: LPFT, callbacks: tuple[Callback, ...] = (), **data: Any) -> LPFT:
    module = DigitsDataModule(batch_size=64, eval_batch_size=100, **data)
    Trainer(max_epochs=1, limit_train_batches=3, callbacks=list(callbacks), **QUIET).fit(method, module)
    return method


def features(data: DigitsDataModule, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data.train_set.read(data.split[part], None)
    with torch.no_grad():
        return net().eval().forward_features(x).double(), y


@pytest.mark.parametrize("standardise", [False, True])
def test_the_head_is_the_best_regression_on_frozen_features(standardise: bool) -> None:
    """Found again without the method: the same C, and the same decisions on validation samples."""
    start = AtStart()
    method = fit(LPFT(net(), strengths=FEW, standardise=standardise, samples=None), (start,), augment=True)
    data = DigitsDataModule()
    data.setup("fit")
    (z, y), (z_val, y_val) = features(data, 0), features(data, 1)
    shift, scale = (z.mean(), z.std()) if standardise else (0.0, 1.0)
    scores, models = [], []
    for c in FEW:
        model = LogisticRegression(C=c, max_iter=2000).fit(((z - shift) / scale).numpy(), y.numpy())
        models.append(model)
        scores.append(model.score(((z_val - shift) / scale).numpy(), y_val.numpy()))
    best = int(np.argmax(scores))
    assert method.strength == FEW[best]
    head = start.state["linear.weight"].double(), start.state["linear.bias"].double()
    found = (z_val @ head[0].T + head[1]).softmax(1).numpy()
    expected = models[best].predict_proba(((z_val - shift) / scale).numpy())
    assert np.abs(found - expected).max() < 0.05 and (found.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert (found.argmax(1) == y_val.numpy()).mean() == pytest.approx(scores[best], abs=0.02)
    for name, tensor in net().state_dict().items():
        assert torch.equal(start.state[name], tensor) != name.startswith("linear"), name


def test_fine_tuning_moves_all_weights_and_no_statistics() -> None:
    for freeze in (True, False):
        start = AtStart()
        method = fit(LPFT(net(8), strengths=[1.0], freeze_bn=freeze), (start,))
        for name, tensor in method.net.state_dict().items():
            assert torch.equal(tensor, start.state[name]) == (freeze and ("running" in name or "tracked" in name)), name


def test_a_run_that_is_resumed_within_an_epoch_moves_no_statistics(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(LPFT(net(), strengths=[1.0]), (Save(),))
    method, start = LPFT(net(), strengths=[1.0]), AtStart()
    trainer = Trainer(max_epochs=1, limit_train_batches=3, callbacks=[start], **QUIET)
    trainer.fit(method, DigitsDataModule(batch_size=64, eval_batch_size=100), ckpt_path=tmp_path / "1.ckpt")
    assert trainer.global_step == 3
    statistics = [name for name in start.state if "running" in name or "tracked" in name]
    assert statistics and not torch.equal(method.net.head.weight, start.state["linear.weight"])
    for name in statistics:
        assert torch.equal(method.net.state_dict()[name], start.state[name]), name


def test_regressions_of_two_classes_and_the_penalty() -> None:
    """With a strong penalty nothing but the prior is left; two classes have two rows whose difference is the logit."""
    generator = np.random.default_rng(0)
    z, y = generator.normal(size=(200, 3)), np.arange(200) % 4 == 0
    (weak, bias), (strong, _) = regressions(z, y.astype(int), [1e-7, 10.0])
    assert weak.shape == (2, 3) and weak.abs().max() < 1e-4 and torch.equal(weak[0], -weak[1])
    assert (bias[1] - bias[0]).item() == pytest.approx(np.log(50 / 150), abs=0.01)
    assert strong.abs().max() > 0.01
    assert len(STRENGTHS) == 100 and STRENGTHS[0] == pytest.approx(1e-7) and STRENGTHS[-1] == pytest.approx(100)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LPFT(net(), strengths=[]), r"strengths=\[\]"),
        (lambda: LPFT(net(), strengths=[1.0, 0.1]), "must rise"),
        (lambda: LPFT(net(), strengths=[0.0]), "from above 0"),
        (lambda: LPFT(net(), samples=0), "samples=0"),
        (lambda: LPFT(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), "Sequential has no forward_features or no linear head"),
        (lambda: LPFT(without_bias()), "the head of SmallCNN has no bias"),
        (lambda: LPFT(net(), FGSM(0.1, bn_mode="train")), "attack.bn_mode='train' moves statistics that freeze_bn keeps"),
        (lambda: fit(LPFT(net(), strengths=[1.0]), val_size=0), "LPFT chooses on validation samples and there are none"),
        (lambda: fit(LPFT(net(), strengths=[1.0], samples=8)), "hold no image of class"),
    ],
)
def test_bad_input(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_from_the_command_line(robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another run's weights; a resumed run does not fit its head again."""
    monkeypatch.chdir(tmp_path)
    robust_pl(
        "fit", "-c", CONFIGS / "digits/standard.yaml", "--trainer.max_epochs", "2", "--run.name", "adversarial_fine_tuning"
    )
    config = CONFIGS / "digits/lp_ft.yaml"
    robust_pl("fit", "-c", config, "--trainer.callbacks+=tests.stopper.StopAfterEpoch", "--trainer.max_epochs", "2")
    monkeypatch.setattr(LPFT, "fit_head", lambda self: pytest.fail("the head was fitted again"))
    robust_pl("fit", "-c", config, "--trainer.max_epochs", "2", "--ckpt_path", "runs/lp_ft/checkpoints/last.ckpt")
