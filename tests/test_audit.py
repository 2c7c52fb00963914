"""An audit passes what is right, and finds whatever was changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from robust_pl import evaluate
from robust_pl.callbacks import FGSM
from robust_pl.callbacks.outcome import attack_batch, score
from robust_pl.callbacks.store import files
from robust_pl.callbacks.store.identity import facts_about
from robust_pl.callbacks.store.store import IMAGES, Store, seal
from robust_pl.data import DigitsDataModule
from robust_pl.evaluation.audit import Audit, audit
from robust_pl.evaluation.audit_batch import Batch
from robust_pl.metrics import Scoreboard
from robust_pl.metrics.scoreboard import as_metrics

from .test_store import BATCH, Stopping, attacks, data, net


def read(index: Tensor) -> tuple[Tensor, Tensor]:
    x, y = data()
    return x[index], y[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    evaluate(net(), data(), attacks(), batch_size=BATCH, store=tmp_path / "run")
    return tmp_path / "run"


def wrong(found: Audit) -> set[str]:
    assert not found.passed and "FAILED" in str(found)
    return {what for what, problems in found.problems.items() if problems}


def test_what_is_right_passes_and_every_image_was_looked_at(folder: Path) -> None:
    model = Stopping(net())
    found = audit(folder, model, read)
    assert found.passed and not found.skipped
    assert found.checked["clean predictions"] == found.checked["pgd: predictions"] == found.checked["fgsm: in the ball"] == 60
    assert model.images == 3 * 60  # clean, fgsm, pgd
    assert "passed" in str(found)


FILES = ["store.json", "predictions.csv", "figures.json", "SHA256SUMS", "shards/00000032.safetensors"]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_found(folder: Path, name: str, place: float) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    try:
        found = audit(folder, net(), read)
    except ValueError as error:  # where the file cannot be read any more
        assert name in str(error) and name == "store.json"
    else:
        assert "files" in wrong(found)


def test_missing_and_additional_files_are_found(folder: Path) -> None:
    (folder / "shards/00000032.safetensors").rename(folder / "shards/00000099.safetensors")
    found = audit(folder, net(), read)
    said = str(found)
    assert "shards/00000032.safetensors is missing" in said and "shards/00000099.safetensors is not listed" in said
    assert "table" in wrong(found)


def change(folder: Path, what: Callable[[dict[str, Tensor]], None]) -> None:
    """A careful forger: changes a shard, writes the table again and renews all sums."""
    path = folder / "shards/00000016.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["robust_pl"])
    what(tensors)
    files.write_tensors(path, tensors, meta)
    store = Store(folder, {}, writer=False)
    store.finish(json.loads((folder / "figures.json").read_text()))


def leave_ball(tensors: dict[str, Tensor]) -> None:
    tensors[IMAGES + "pgd"][3] += 0.05


def leave_box(tensors: dict[str, Tensor]) -> None:
    tensors[IMAGES + "pgd"][3, 0, 0, 0] = -0.015


def hold_nan(tensors: dict[str, Tensor]) -> None:
    tensors[IMAGES + "pgd"][3, 0, 0, 0] = float("nan")


def claim_robust(tensors: dict[str, Tensor]) -> None:
    broken = (~tensors["right_pgd"]).nonzero()[0]
    tensors["right_pgd"][broken] = True
    tensors["prediction_pgd"][broken] = tensors["label"][broken]


def claim_clean(tensors: dict[str, Tensor]) -> None:
    tensors["prediction"][0] = (tensors["prediction"][0] + 1) % 10


def smaller_size(tensors: dict[str, Tensor]) -> None:
    tensors["l2_pgd"][5] *= 0.9


def other_label(tensors: dict[str, Tensor]) -> None:
    tensors["label"][2] = (tensors["label"][2] + 1) % 10


@pytest.mark.parametrize(
    ("forge", "expected"),
    [
        (leave_ball, "pgd: in the ball"),
        (leave_box, "pgd: in the box"),
        (hold_nan, "pgd: finite"),
        (claim_robust, "pgd: predictions"),
        (claim_clean, "clean predictions"),
        (smaller_size, "pgd: l2 sizes"),
        (other_label, "labels"),
    ],
)
def test_a_forger_who_renews_the_sums_is_found(folder: Path, forge: Callable[[dict[str, Tensor]], None], expected: str) -> None:
    change(folder, forge)
    found = audit(folder, net(), read)
    assert expected in wrong(found) and "files" not in wrong(found)


def test_an_evaluation_stored_before_there_were_fairness_figures_passes(folder: Path) -> None:
    figures = json.loads((folder / "figures.json").read_text())
    kinds = ("acc_", "worst_class_", "forwards_", "backwards_", "seconds_")
    before = {name: value for name, value in figures.items() if name.startswith(kinds)}
    assert len(before) < len(figures)
    files.write_json(folder / "figures.json", before)
    seal(folder)
    assert audit(folder, net(), read).passed
    del before["worst_class_pgd"]  # which there was from the start
    files.write_json(folder / "figures.json", before)
    seal(folder)
    assert wrong(audit(folder, net(), read)) == {"figures"}


@pytest.mark.parametrize("kind", ["nsd_pgd", "fair_clean", "worst_tenth_worst", "class_acc_pgd/"])
def test_forged_fairness_is_found(folder: Path, kind: str) -> None:
    figures = json.loads((folder / "figures.json").read_text())
    name = next(name for name in figures if name.startswith(kind))
    for change in ({name: figures[name] + 0.1}, {}):  # changed, and left out
        files.write_json(folder / "figures.json", {k: v for k, v in figures.items() if k != name} | change)
        seal(folder)
        assert wrong(audit(folder, net(), read)) == {"figures"}


def test_forged_figures_are_found(folder: Path) -> None:
    figures = json.loads((folder / "figures.json").read_text())
    figures["acc_worst"] += 0.1
    files.write_json(folder / "figures.json", figures)
    seal(folder)
    assert wrong(audit(folder, net(), read)) == {"figures"}


def test_another_network_or_other_images_are_found(folder: Path) -> None:
    assert {"weights", "pgd: predictions"} <= wrong(audit(folder, net(1), read))

    def shifted(index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = read(index)
        return x + 1e-6 * (x < 0.5), y

    assert "clean images" in wrong(audit(folder, net(), shifted))


def test_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, {}).close()
    with pytest.raises(ValueError, match="not finished: start it again"):
        audit(tmp_path, net(), read)
    with pytest.raises(FileNotFoundError, match=r"holds no store\.json"):
        audit(tmp_path / "nothing", net(), read)


def test_what_was_not_kept_is_said(tmp_path: Path) -> None:
    store, board = Store(tmp_path, {}, images=False), Scoreboard(["fgsm", "pgd"], 10)
    x, y = data()
    outcome = attack_batch(net(), attacks(), x, y, torch.arange(len(x)))
    score(board, outcome)
    store.identify(**facts_about(net(), attacks()))
    store.add(x, outcome)
    store.finish(as_metrics(board.rows()))
    found = audit(tmp_path, net(), read)
    assert found.passed and any("images of pgd, which were not kept" in reason for reason in found.skipped)


# Bytes that make a shard another one ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_byte_changed_anywhere_in_a_shard_is_found_and_stops_nothing(folder: Path) -> None:
    path = folder / "shards/00000016.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(0, header, 31), *range(header, len(content), 1999)]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert "files" in wrong(audit(folder, net(), read)), place


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda t: t["index"].add_(1000), "not all in the data set"),
        (lambda t: t.pop("right_pgd"), "it holds no"),
        (lambda t: t.update(loss=t["loss"][:3]), "is not as long as the index"),
        (lambda t: t["label"].fill_(11), "its labels are not in"),
        (lambda t: t["loss"].mul_(1.5), "clean loss"),
        (lambda t: t["confidence"].mul_(0.5), "clean confidence"),
    ],
)
def test_a_shard_that_no_evaluation_writes_is_a_finding(folder: Path, what: Callable[..., object], words: str) -> None:
    path = folder / "shards/00000016.safetensors"
    tensors, meta = files.read_tensors(path)
    what(tensors)
    files.write_tensors(path, tensors, meta)
    found = audit(folder, net(), read)
    assert "files" in wrong(found) and words in " ".join(str(found).split())


def test_samples_that_were_left_out_or_are_there_twice_are_found(tmp_path: Path) -> None:
    digits = DigitsDataModule(eval_batch_size=120)
    evaluate(net(), digits, {"fgsm": FGSM(0.02)}, store=tmp_path)
    about = json.loads((tmp_path / "store.json").read_text())
    about["facts"]["samples"] = 360
    (tmp_path / "store.json").write_text(json.dumps(about))
    seal(tmp_path)

    def again() -> Audit:
        return audit(tmp_path, net(), lambda index: digits.test_set.read(index, None))

    assert again().passed
    path = tmp_path / "shards/00000120.safetensors"
    content = path.read_bytes()
    path.unlink()
    seal(tmp_path)
    assert "240 are there, and the data set had 360" in again().problems["samples"][0]
    path.write_bytes(content)
    (tmp_path / "shards/00000360.safetensors").write_bytes(content)
    seal(tmp_path)
    assert "120 are there more than once" in again().problems["samples"][0]


def test_a_tie_within_rounding_is_no_other_prediction(folder: Path) -> None:
    stored = torch.tensor([0, 1, 9])
    logits = torch.tensor([[1.0, 1.0005, 0.0], [1.0, 0.99, 0.0], [1.0, 0.0, 0.0]])
    found = Audit(folder)
    batch = Batch(found, {"index": torch.arange(3), "label": stored}, {}, {}, torch.device("cpu"))
    batch.rounding = 1e-3
    batch._check_predictions("predictions", stored, logits)
    assert found.problems == {"predictions": ["samples 1, 2: other than stored"]}
