"""Everything by way of the Hub: publish teachers, label with them by id, co-supervise by id, and load without us.

    hf auth login && python recipes/hub_roundtrip.py --prefix me/roundtrip --private
    python recipes/hub_roundtrip.py --prefix me/roundtrip --num_processes 2

Four stages, each a process of its own that knows nothing but ids and commits: `publish` (digits, a backbone and five
small teachers: transformers, timm, peft and scikit-learn), `label` (the pool), `train` (the student, on
`--num_processes`) and `check` (plain transformers and timm, with this package out of reach, must predict the same to
1e-5). HF_ENDPOINT chooses the Hub. What it makes is called PREFIX-digits, PREFIX-teachers and so on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("publish", "label", "train", "check")
LABELS = [str(digit) for digit in range(10)]
IMAGE_SIZE = 32
NUM_TEACHER_EXAMPLES, NUM_POOL_EXAMPLES = 400, 1000
NUM_GENERALIST_EXAMPLES = 60  # few, so that there is a gap to close


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True, help="User and first part of the names, such as me/roundtrip.")
    parser.add_argument("--folder", default="outputs/hub_roundtrip", help="Where results are put.")
    parser.add_argument("--num_processes", type=int, default=1, help="Processes of the training.")
    parser.add_argument("--private", action="store_true", help="Make the repositories private.")
    parser.add_argument("--stage", choices=STAGES, help="One stage alone; those before it must have run.")
    return parser.parse_args()


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def publish(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train five small teachers of four kinds, and push them, the data and a backbone; tell ids and commits."""
    import timm
    import torch
    from datasets import DatasetDict, load_from_disk
    from huggingface_hub import HfApi
    from prepare import digits

    from hf_cosupervise import Teacher, TeacherHierarchy, push_hierarchy

    data = load_from_disk(str(digits(folder / "digits")))["train"]
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    cut = NUM_TEACHER_EXAMPLES + NUM_POOL_EXAMPLES
    labelled = data.select(order[:NUM_TEACHER_EXAMPLES])
    split = DatasetDict(train=data.select(order[NUM_TEACHER_EXAMPLES:cut]), test=data.select(order[cut:]))
    split.push_to_hub(f"{args.prefix}-digits", private=args.private)

    pixels = torch.stack([to_pixels(image) for image in labelled["image"]])
    targets = torch.tensor(labelled["label"][:])
    torch.manual_seed(0)
    # With its first random weights: on digits, even those give features that a linear head can tell apart.
    push_timm(timm.create_model("test_convnext", num_classes=len(LABELS)), f"{args.prefix}-backbone", args.private)
    parts = {"low": range(5), "high": range(5, 10), "round": (0, 3, 6, 8, 9), "straight": (1, 2, 4, 5, 7)}
    rows = {name: torch.isin(targets, torch.tensor(list(part))) for name, part in parts.items()}
    teachers_dir = folder / "teachers"
    few = slice(NUM_GENERALIST_EXAMPLES)
    train_transformers(pixels[few], targets[few], teachers_dir / "generalist")
    train_sklearn(labelled.select(torch.where(rows["high"])[0].tolist()), teachers_dir / "high")
    train_transformers(pixels[rows["straight"]], targets[rows["straight"]], teachers_dir / "straight")
    low = timm.create_model("test_resnet", num_classes=len(LABELS))
    fit(low.train(), pixels[rows["low"]], targets[rows["low"]])
    push_timm(low, f"{args.prefix}-low", args.private)
    train_adapter(args, teachers_dir / "generalist", pixels[rows["round"]], targets[rows["round"]])

    scopes = {name: tuple(LABELS[label] for label in part) for name, part in parts.items()}
    hierarchy = TeacherHierarchy(
        LABELS,
        [
            Teacher(str(teachers_dir / "generalist")),
            Teacher(f"{args.prefix}-low", level=1, name="low", kind="timm", scope=scopes["low"]),
            Teacher(str(teachers_dir / "high"), level=1, scope=scopes["high"]),
            Teacher(f"{args.prefix}-round", level=2, name="round", scope=scopes["round"]),
            Teacher(str(teachers_dir / "straight"), level=2, scope=scopes["straight"]),
        ],
    )
    pushed = push_hierarchy(hierarchy, f"{args.prefix}-teachers", private=args.private)
    return {
        "teachers_commit": pushed.oid,
        "data_commit": HfApi().dataset_info(f"{args.prefix}-digits").sha,
        "backbone_commit": HfApi().model_info(f"{args.prefix}-backbone").sha,
    }


def to_pixels(image: Any) -> Any:
    """An image as a tensor (3, 32, 32), -1 to 1."""
    import torch

    resized = np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)), dtype=np.float32)
    return torch.from_numpy(resized / 127.5 - 1).permute(2, 0, 1)


def image_processor() -> Any:
    """What does the same to images in transformers."""
    from transformers import ViTImageProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def fit(model: Any, pixels: Any, targets: Any, steps: int = 60, learning_rate: float = 3e-3) -> None:
    """Fit a small network to few images: every step sees all of them."""
    import torch

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        output = model(pixels)
        loss = torch.nn.functional.cross_entropy(getattr(output, "logits", output), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def new_resnet() -> Any:
    """A ResNet of transformers with fresh weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = dict(enumerate(LABELS))
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )
    return ResNetForImageClassification(config)


def train_transformers(pixels: Any, targets: Any, folder: Path) -> None:
    """Train a ResNet and keep it in a folder."""
    model = new_resnet()
    fit(model.train(), pixels, targets)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def train_sklearn(labelled: Any, folder: Path) -> None:
    """Train a logistic regression on the pixels and keep it in a folder."""
    from sklearn.linear_model import LogisticRegression

    from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

    if folder.exists():
        return
    features = np.stack([np.asarray(image).ravel() for image in labelled["image"]]).astype(np.float32) / 255
    model = LogisticRegression(max_iter=300).fit(features, labelled["label"][:])
    save_sklearn_teacher(model, folder, {"kind": "pixels", "mode": "L"}, LABELS)


def train_adapter(args: argparse.Namespace, base_dir: Path, pixels: Any, targets: Any) -> None:
    """Push a teacher as a base, train an adapter and a head on it, and push those alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    base_id = f"{args.prefix}-base"
    AutoModelForImageClassification.from_pretrained(base_dir).push_to_hub(base_id, private=args.private)
    image_processor().push_to_hub(base_id, private=args.private)
    base = AutoModelForImageClassification.from_pretrained(base_id, use_safetensors=True, trust_remote_code=False)
    convolutions = [name for name, _ in base.named_modules() if name.endswith("convolution")]
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=convolutions, modules_to_save=["classifier"]))
    fit(adapted.eval(), pixels, targets)  # an adapter keeps no statistics of batches, so they must not move
    adapted.push_to_hub(f"{args.prefix}-round", private=args.private)


def push_timm(model: Any, repo_id: str, private: bool) -> None:
    """Push a model as timm does."""
    import timm

    model.pretrained_cfg.update(input_size=(3, IMAGE_SIZE, IMAGE_SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    timm.models.push_to_hf_hub(
        model, repo_id, private=private, safe_serialization=True, model_config={"label_names": LABELS}
    )


# ── label, train, check ─────────────────────────────────────────────────────────────────────────────────────────────


def label(args: argparse.Namespace, folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Label the data by teachers that are known by id and commit, and push the pool."""
    from hf_cosupervise import build_pool, load_hierarchy
    from hf_cosupervise.evaluation.methods import weak_accuracy

    hierarchy = load_hierarchy(f"{args.prefix}-teachers", revision=known["teachers_commit"])
    data = {"dataset": f"{args.prefix}-digits", "revision": known["data_commit"], "oracle_column": "label"}
    pool = build_pool(hierarchy=hierarchy, disable_tqdm=True, **data)
    test_pool = build_pool(hierarchy=hierarchy, split="test", disable_tqdm=True, **data)
    pushed = pool.push_to_hub(f"{args.prefix}-pool", private=args.private)
    return {"pool_commit": pushed.oid, "weak_accuracy": weak_accuracy(test_pool)}


def train(args: argparse.Namespace, folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Co-supervise a backbone by id on a pool by id, beside the baselines, and push the student."""
    from datasets import load_dataset

    from hf_cosupervise import CoSupervisedConfig, PseudolabelPool
    from hf_cosupervise.evaluation.comparison import compare_methods
    from hf_cosupervise.evaluation.plots import plot_pgr
    from hf_cosupervise.evaluation.report import merge_reports, save_report

    pool = PseudolabelPool.load(f"{args.prefix}-pool", revision=known["pool_commit"])
    test = load_dataset(f"{args.prefix}-digits", revision=known["data_commit"], split="test")
    output_dir = folder / "student"
    config = CoSupervisedConfig(
        str(output_dir),
        learning_rate=1e-2,
        num_train_epochs=20,
        seed=0,
        student_revision=known["backbone_commit"],
        hub_model_id=f"{args.prefix}-student",
        hub_private_repo=args.private,
        disable_tqdm=True,
        report_to="none",
    )
    if config.world_size != args.num_processes:
        raise RuntimeError(f"{args.num_processes} processes were asked for, got {config.world_size}.")
    report, trainer = compare_methods(
        f"{args.prefix}-backbone", config, pool, test, weak=known["weak_accuracy"], resume=True
    )
    report = merge_reports([report], [config.seed])
    if trainer.is_world_process_zero():
        save_report(report, output_dir / "report.json")
        plot_pgr(report, output_dir / "pgr.png")
    pushed = trainer.push_to_hub(
        report=report, figure="pgr.png", dataset=f"{args.prefix}-digits", dataset_args="test", dataset_tags=[]
    )
    logits = trainer.predict(test.remove_columns("label")).predictions
    if pushed is not None:
        np.save(folder / "logits.npy", logits)
    accuracies = {name: numbers["accuracy"][0] for name, numbers in report["methods"].items()}
    return {"student_commit": None if pushed is None else pushed.oid, "accuracy": accuracies}


def check(args: argparse.Namespace, folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Load the student by plain transformers and by plain timm, and compare what they predict."""
    sys.modules["hf_cosupervise"] = None  # type: ignore[assignment]  # importing it fails from here on
    import timm
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    where = {"revision": known["student_commit"]}
    test = load_dataset(f"{args.prefix}-digits", revision=known["data_commit"], split="test")
    images = [image.convert("RGB") for image in test["image"]]
    model = AutoModelForImageClassification.from_pretrained(f"{args.prefix}-student", **where).eval()
    processor = AutoImageProcessor.from_pretrained(f"{args.prefix}-student", **where)
    plain = timm.create_model(f"hf-hub:{args.prefix}-student@{known['student_commit']}", pretrained=True).eval()
    with torch.no_grad():
        inputs = processor(images, return_tensors="pt")["pixel_values"]
        answers = {"transformers": model(inputs).logits, "timm": plain(inputs)}
    wanted = torch.from_numpy(np.load(folder / "logits.npy")).softmax(dim=1)
    differences = {name: float((logits.softmax(dim=1) - wanted).abs().max()) for name, logits in answers.items()}
    if max(differences.values()) > 1e-5:
        raise RuntimeError(
            f"The student must predict the same probabilities wherever it is loaded, got differences of {differences}."
        )
    return {"differences": differences, "labels": list(model.config.id2label.values())}


# ── one after another ───────────────────────────────────────────────────────────────────────────────────────────────


def run_stage(args: argparse.Namespace, folder: Path) -> None:
    """Run one stage here, with what the stages before it have written down."""
    results = folder / "results.json"
    known = json.loads(results.read_text()) if results.is_file() else {}
    if args.stage == "publish":
        found = publish(args, folder)
    else:
        found = {"label": label, "train": train, "check": check}[args.stage](args, folder, known)
    if os.environ.get("RANK", "0") == "0":
        temporary = results.with_suffix(".tmp")
        temporary.write_text(json.dumps(known | found, indent=2) + "\n")
        os.replace(temporary, results)
        print(f"{args.stage}: {json.dumps(found)}", flush=True)


def main() -> None:
    """Run the stages, each in a process of its own."""
    args = parse_arguments()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage is not None:
        run_stage(args, folder)
        return
    (folder / "results.json").unlink(missing_ok=True)
    for stage in STAGES:
        start, environment = [sys.executable], dict(os.environ)
        if stage == "train" and args.num_processes > 1:
            # `--multi_gpu` gets several processes on a CPU too, where ACCELERATE_USE_CPU says that it is meant.
            start += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={args.num_processes}"]
            import torch

            if not torch.accelerator.is_available():
                environment["ACCELERATE_USE_CPU"] = "true"
        subprocess.run([*start, __file__, *sys.argv[1:], "--stage", stage], check=True, env=environment)


if __name__ == "__main__":
    main()
