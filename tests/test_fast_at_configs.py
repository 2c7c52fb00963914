"""Every config of the FastAT benchmark's protocol composes and trains two steps, on images made up here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.fast_at import SETTINGS, Row, rows_of
from robust_pl.data import CIFAR10DataModule, TinyImageNetDataModule
from robust_pl.data.augment import crop_and_flip
from robust_pl.data.images import ImagesInMemory
from robust_pl.trust import CONFIG_KEY

from .conftest import CONFIGS

CLI = Callable[..., None]
GROUP = CONFIGS / "fast_at"
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "cifar10_cpu")
SMALL = ("--model.init_args.net", "SmallCNN", "--model.init_args.net.init_args.width", 2)
SHORT = ("--data.init_args.batch_size", 4, "--data.init_args.eval_batch_size", 2, "--trainer.limit_train_batches", 2)
SHORT += (
    "--data.init_args.val_size",
    4,
    "--trainer.max_steps",
    2,
    "--trainer.limit_val_batches",
    1,
    "--trainer.logger",
    "false",
)
SHORT += ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


def each(dataset: str) -> list[Row]:
    """One row a config of the data set, without those that test the same training in another way."""
    rows = [row for setting in SETTINGS for row in rows_of(dataset, setting)]
    return list({(row.method, row.setting): row for row in rows}.values())


ALL = [(dataset, row) for dataset in DATASETS for row in each(dataset)]
QUICK = [(dataset, row) for dataset, row in ALL if dataset == "cifar10_cpu" and row.setting == "protocol"]


def has_files_of_its_own(dataset: str, row: Row) -> bool:
    """Whether a method is another one on this data set than on CIFAR-10; if not, its files are all tested there."""
    return dataset == "cifar10" or row.method == "n_fgsm" or any(Path(f).parent.name == dataset for f in row.configs(dataset))


OTHERS = [case for case in ALL if case not in QUICK and has_files_of_its_own(*case)]


def named(cases: list[tuple[str, Row]]) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [f"{dataset}-{row.method}-{row.setting}" for dataset, row in cases]}


@pytest.fixture
def two_steps(robust_pl: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Train two steps with a row's configs; returns the last checkpoint."""
    monkeypatch.chdir(tmp_path)

    def images(data: Any) -> ImagesInMemory:
        count = 20
        pixels = torch.randint(0, 256, (count, *data.image_shape), dtype=torch.uint8)
        return ImagesInMemory(pixels, torch.arange(count) % data.num_classes, crop_and_flip)

    for kind in (CIFAR10DataModule, TinyImageNetDataModule):
        monkeypatch.setattr(kind, "load_train", images)
    monkeypatch.setattr(TinyImageNetDataModule, "class_names", [f"class {i}" for i in range(200)])

    def run(dataset: str, row: Row, *options: Any) -> dict[str, Any]:
        files = [part for file in row.configs(dataset) for part in ("-c", CONFIGS.parent / file)]
        more = ("--trainer.max_steps", 16) if row.method == "free_at" else ()  # whose replays are steps
        robust_pl("fit", *files, "--run.name", "run", *SHORT, *options, *more)
        return torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)

    return run


@pytest.mark.parametrize(("dataset", "row"), **named(QUICK))
def test_two_steps(two_steps: Callable[..., dict[str, Any]], dataset: str, row: Row) -> None:
    assert two_steps(dataset, row, *SMALL)["global_step"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "row"), **named(OTHERS))
def test_two_steps_of_every_other(two_steps: Callable[..., dict[str, Any]], dataset: str, row: Row) -> None:
    found = two_steps(dataset, row, *SMALL)
    config = found[CONFIG_KEY]
    assert found["global_step"] >= 2
    # What a fragment does not speak of comes from the base, and what it says is not lost.
    base, last = (yaml.safe_load((CONFIGS.parent / row.configs(dataset)[i]).read_text()) for i in (0, -1))
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 5e-4
    assert config["data"]["init_args"].get("val_split") == base["data"]["init_args"].get("val_split", "random")
    assert list(config["attacks"]) == list(base["attacks"])
    assert config["run"]["monitor"] == last.get("run", base["run"])["monitor"] or row.setting == "paper"
    assert_contains(config["model"], last.get("model", {}))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny_imagenet"])
@pytest.mark.parametrize("method", ["n_fgsm", "fgsm_fuap"])
def test_two_steps_of_the_protocols_own_network(two_steps: Callable[..., dict[str, Any]], dataset: str, method: str) -> None:
    classes = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}[dataset]
    unwatched = ("--trainer.callbacks", "[]", "--run.monitor", "val/acc_pgd10")  # the monitor alone would take a minute
    found = two_steps(dataset, Row(method, method), *unwatched)
    assert found["state_dict"]["net.linear.weight"].shape == (classes, 512) and found["global_step"] == 2


def assert_contains(whole: Any, part: Any) -> None:
    """Everything that ``part`` says stands in ``whole``; a class path there is the full one."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_contains(whole[key], value)
    elif isinstance(part, str) and isinstance(whole, str):
        assert whole == part or whole.endswith(f".{part}")
    else:
        assert whole == part or str(whole) == str(part)


def test_a_method_keeps_network_optimizer_and_schedule_of_the_base(robust_pl: CLI, capsys: pytest.CaptureFixture[str]) -> None:
    """A second file with another class path adds to the first one's arguments, and takes none of them away."""
    base = yaml.safe_load((GROUP / "cifar10.yaml").read_text())["model"]
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", GROUP / "cifar10.yaml", "-c", GROUP / "methods" / "grad_align.yaml", "--print_config")
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["model"]["class_path"] == "robust_pl.methods.GradAlign" != base["class_path"]
    assert found["model"]["init_args"]["lmbda"] == 0.2 and found["model"]["init_args"]["box"] is True
    for part in ("net", "optimizer", "schedule"):
        assert_contains(found["model"]["init_args"][part], base["init_args"][part])
    assert [one["class_path"].rsplit(".")[-1] for one in found["trainer"]["callbacks"]] == ["EMA", "CatastrophicOverfitting"]


def test_what_a_method_does_not_take_is_refused(robust_pl: CLI, capsys: pytest.CaptureFixture[str]) -> None:
    """A paper's settings behind another method are an error, and not left out in silence."""
    with pytest.raises(SystemExit) as stop:
        robust_pl(
            "fit", "-c", GROUP / "cifar10.yaml", "-c", GROUP / "methods" / "n_fgsm.yaml", "-c", GROUP / "paper" / "elle.yaml"
        )
    assert stop.value.code == 2 and "lmbda" in capsys.readouterr().err


def test_the_data_sets_differ_in_their_data_alone() -> None:
    """The three bases are one protocol."""
    found = {name: yaml.safe_load((GROUP / f"{name}.yaml").read_text()) for name in DATASETS}
    for name in ("cifar100", "tiny_imagenet"):
        for part in ("attacks", "val_attacks", "trainer", "run"):
            assert found[name][part] == found["cifar10"][part]
        for part in ("optimizer", "schedule"):
            assert found[name]["model"]["init_args"][part] == found["cifar10"]["model"]["init_args"][part]
        assert found[name]["data"]["init_args"]["augment"] == found["cifar10"]["data"]["init_args"]["augment"]
    for part in ("attacks", "val_attacks"):  # AutoAttack's batch changes nothing
        assert list(found["cifar10_cpu"][part]) == list(found["cifar10"][part])


def merged(whole: Any, part: Any) -> Any:
    """What the files say one after the other, where no class path changes."""
    if not (isinstance(whole, dict) and isinstance(part, dict)):
        return part
    return {key: merged(whole.get(key), part[key]) if key in part else whole[key] for key in [*whole, *(part.keys() - whole)]}


NUMBERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("cifar10", "elle", "protocol", {"lmbda": 1.0}),
    ("cifar10", "elle", "paper", {"lmbda": 1000.0}),
    ("cifar10", "zero_grad", "protocol", {"attack.q": 0.35}),
    ("cifar100", "zero_grad", "protocol", {"attack.q": 0.45}),
    ("tiny_imagenet", "zero_grad", "protocol", {"attack.q": 0.35}),
    ("cifar10", "rs_aaer", "protocol", {"loss_weight": 2.5, "output_weight": 1.5}),
    ("cifar100", "rs_aaer", "paper", {"loss_weight": 3.5, "output_weight": 1.5}),
    ("tiny_imagenet", "n_aaer", "protocol", {"loss_weight": 1.5, "output_weight": 0.15}),
    ("cifar100", "fgsm_fuap", "protocol", {"clusters": 200}),
    ("tiny_imagenet", "fgsm_fuap", "protocol", {"clusters": 200}),
    ("tiny_imagenet", "fgsm_fuap", "paper", {"clusters": 300, "schedule.milestones": [0.9545]}),
    ("tiny_imagenet", "fgsm_uap", "paper", {"uap_eps": "10/255", "schedule.milestones": [0.9545]}),
    ("tiny_imagenet", "fgsm_cuap", "paper", {"schedule.milestones": [0.9545]}),
    ("cifar100", "fgsm_cuap", "paper", {"schedule.milestones": [0.909, 0.9545]}),
    ("cifar100", "fgsm_pgi", "protocol", {"reset_every": 40, "lmbda": 10.0, "decay": 0.3}),
    ("cifar100", "fgsm_pgi", "paper", {"reset_every": 10, "label_factor": 0.6}),
    ("cifar10", "liet", "protocol", {"lmbda": 100.0, "smoothing": 0.6}),
    ("cifar100", "liet", "protocol", {"lmbda": 200.0, "smoothing": 0.8}),
    ("tiny_imagenet", "liet", "protocol", {"lmbda": 100.0, "smoothing": 0.6}),
    ("cifar10", "fgsm_law", "paper", {"lmbda": 12.0, "label_factor": 0.7, "accept_below": 0.82}),
    ("cifar100", "fgsm_law", "paper", {"lmbda": 42.0, "label_factor": 0.5, "accept_below": 0.55, "optimizer.lr": 0.2}),
    ("tiny_imagenet", "fgsm_law", "paper", {"lmbda": 38.0, "label_factor": 0.3, "accept_below": 0.55, "optimizer.lr": 0.1}),
]


@pytest.mark.parametrize(("dataset", "method", "setting", "numbers"), NUMBERS)
def test_numbers_of_protocol_and_papers(dataset: str, method: str, setting: str, numbers: dict[str, Any]) -> None:
    """Where a method has others on one data set than on another, the paper's settings do not take them away."""
    found: Any = {}
    for file in Row(method, method, setting).configs(dataset):
        found = merged(found, yaml.safe_load((CONFIGS.parent / file).read_text()))
    for name, value in numbers.items():
        place, _, key = name.rpartition(".")
        settings = found["model"]["init_args"]
        assert (settings[place]["init_args"] if place else settings)[key] == value, name


def test_every_fragment_belongs_to_a_method() -> None:
    methods = {path.stem for path in (GROUP / "methods").glob("*.yaml")}
    for path in [*GROUP.glob("methods/*/*.yaml"), *GROUP.glob("paper/**/*.yaml")]:
        assert path.stem in methods, path
        assert path.parent.name in ("paper", *DATASETS), path
