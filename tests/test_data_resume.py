"""A run that is stopped and resumed sees exactly the batches of the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from robust_pl.data import DigitsDataModule, ImageDataModule


class Recorder(LightningModule):
    """Records (epoch, batch_idx, index, pixel sum) of each training batch and the indices of each validation."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen: list[tuple[int, int, list[int], float]] = []
        self.validated: list[list[int]] = []
        self.validated_pixels: list[float] = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise RuntimeError("stopped by the test")
        self.seen.append((self.current_epoch, batch_idx, index.tolist(), float(x.double().sum())))
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)[:, :64]), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[2].tolist())
        self.validated_pixels.append(float(batch[0].double().sum()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAt(Callback):
    """Saves a checkpoint at the end of the named training batches, epochs or validations."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batches, self.saved = folder, 0, {}

    def _save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[name] = (path, self.batches)

    def on_train_batch_end(self, trainer, *args) -> None:
        self.batches += 1
        self._save(trainer, f"batch{self.batches}")

    def on_validation_end(self, trainer, *args) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, f"validation{self.batches}")

    def on_train_epoch_end(self, trainer, *args) -> None:
        self._save(trainer, f"epoch{self.batches}")


def fit(tmp_path: Path, workers: int = 0, **kwargs) -> Recorder:
    return fit_module(tmp_path, DigitsDataModule(batch_size=256, num_workers=workers, augment=True), **kwargs)


def fit_module(
    tmp_path: Path, data: ImageDataModule, ckpt: Path | None = None, callbacks=(), fail_at=None, **kwargs
) -> Recorder:
    module = Recorder(fail_at)
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{"accelerator": "cpu", "max_epochs": 3, "enable_checkpointing": bool(callbacks)} | kwargs,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 2}, {"limit_train_batches": 3}],
    ids=["plain", "accumulate", "val_check_interval", "limit"],
)
def test_resume_from_every_checkpoint(tmp_path, kwargs):
    saver = SaveAt(tmp_path)
    full = fit(tmp_path, callbacks=[saver], **kwargs)
    steps = kwargs.get("limit_train_batches", 5)
    assert [(epoch, batch) for epoch, batch, *_ in full.seen] == [(e, b) for e in range(3) for b in range(steps)]
    assert len({tuple(index) for _, _, index, _ in full.seen}) == 3 * steps  # every epoch has its own order
    assert len(saver.saved) > 3 * steps
    for name, (path, batches) in saver.saved.items():
        resumed = fit(tmp_path, ckpt=path, **kwargs)
        assert resumed.seen == full.seen[batches:], name


@pytest.mark.slow
def test_resume_with_workers_that_read_ahead(tmp_path):
    saver = SaveAt(tmp_path)
    full = fit(tmp_path, workers=2, callbacks=[saver])
    assert full.seen == fit(tmp_path).seen
    for name in ("batch1", "batch3", "batch5", "validation5", "epoch5", "batch7"):
        path, batches = saver.saved[name]
        assert fit(tmp_path, workers=2, ckpt=path).seen == full.seen[batches:], name


def test_resume_from_model_checkpoint(tmp_path):
    """The usual callbacks: one saves at validation end, one every two steps."""
    keep = {"save_top_k": -1, "dirpath": tmp_path, "filename": "{step}"}
    callbacks = [
        ModelCheckpoint(**keep | {"filename": "val{step}"}, save_on_train_epoch_end=False),
        ModelCheckpoint(**keep, every_n_train_steps=2),
    ]
    full = fit(tmp_path, callbacks=callbacks)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 9
    for path in paths:
        batches = torch.load(path, weights_only=True)["global_step"]
        assert fit(tmp_path, ckpt=path).seen == full.seen[batches:], path.name


def test_resume_after_an_exception_repeats_the_batch_that_failed(tmp_path):
    """The failed batch was handed out but not trained on."""

    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    full = fit(tmp_path)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(tmp_path, callbacks=[SaveOnException()], fail_at=7)
    assert fit(tmp_path, ckpt=tmp_path / "failed.ckpt").seen == full.seen[7:]


def test_resume_under_max_steps(tmp_path):
    """Lightning treats runs limited by steps in another way, and tells the sampler a wrong epoch after ``epoch5``."""
    saver = SaveAt(tmp_path)
    kwargs = {"max_steps": 12, "max_epochs": -1}
    full = fit(tmp_path, callbacks=[saver], **kwargs)
    assert len(full.seen) == 12
    for name, (path, batches) in saver.saved.items():
        assert fit(tmp_path, ckpt=path, **kwargs).seen == full.seen[batches:], name


def test_overfit_batches_and_no_validation(tmp_path):
    seen = fit(tmp_path, overfit_batches=2).seen
    assert [index for _, _, index, _ in seen] == 3 * [index for _, _, index, _ in seen[:2]]
    data = DigitsDataModule(val_size=0)
    module = Recorder()
    Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    assert len(module.seen) == 11 and module.validated == []


def test_validation_sees_every_sample_once_in_order(tmp_path):
    module = fit(tmp_path, num_sanity_val_steps=0)
    expected = DigitsDataModule(batch_size=256).split[1].tolist()
    assert module.validated == 3 * [expected]


def test_another_batch_size_cannot_resume_mid_epoch(tmp_path):
    loader = DigitsDataModule(batch_size=64).train_dataloader()
    batches = iter(loader)
    next(batches)
    other = DigitsDataModule(batch_size=32).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="same batch_size"):
        next(iter(other))


def test_loader_resumes_without_a_trainer():
    def run(loader):
        return [(epoch, b[2].tolist()) for epoch in range(2) if not loader.sampler.set_epoch(epoch) for b in loader]

    loader, other = (DigitsDataModule(batch_size=256).train_dataloader() for _ in range(2))
    full = run(loader)
    loader.sampler.set_epoch(1)
    batches = iter(loader)
    next(batches), next(batches)
    other.load_state_dict(loader.state_dict())
    assert other.state_dict() == loader.state_dict()
    other.sampler.set_epoch(1)
    assert [(1, b[2].tolist()) for b in other] == full[-3:]
