"""Pre-train a small student on unlabelled images alone, for the recipe that has to run without any download."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.nn import functional

from hf_cosupervise.data.columns import find_input_column
from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.students.head import linear_head


def vicreg(
    data: Dataset,
    folder: Path,
    *,
    seed: int,
    model_type: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    steps: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    noise: float = 0.4,
    erase: float = 0.15,
    shift: int = 1,
    projection_size: int = 256,
) -> None:
    """Pre-train a transformers image classifier's backbone by VICReg and save it; its head stays random.

    Two views of each image, each shifted, with its own noise and its own erased pixels, go through the backbone and a
    projector that is thrown away. The loss wants the two projections to agree (weight 25), each of their dimensions to
    vary over the batch (25), and the dimensions to be uncorrelated (1).

    Args:
        data (`datasets.Dataset`):
            Images; a label column is not looked at and should not be there.
        folder (`pathlib.Path`):
            Where the model goes, whole or not at all.
        seed (`int`):
            Decides weights, batches and views.
        model_type (`str`):
            A model type of transformers whose classifier ends in one linear layer, such as `convnext`.
        config (`Mapping[str, Any]`):
            Its configuration.
        processor (`Mapping[str, Any]`):
            Arguments of the image processor, `class` among them.
        steps (`int`, *optional*, defaults to 100):
            Steps of Adam, with a cosine schedule.
        batch_size (`int`, *optional*, defaults to 128):
            Images per step, drawn with replacement.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Peak learning rate.
        noise (`float`, *optional*, defaults to 0.4):
            Standard deviation of the noise, in normalised units.
        erase (`float`, *optional*, defaults to 0.15):
            Probability that a pixel is set to the darkest value.
        shift (`int`, *optional*, defaults to 1):
            Largest move along each axis, in pixels.
        projection_size (`int`, *optional*, defaults to 256):
            Width of the projector.

    Source:
        Bardes, Ponce and LeCun, arXiv 2105.04906.
    """
    settings = dict(processor)
    processing_class = getattr(transformers, settings.pop("class"))(**settings)
    model_config = transformers.AutoConfig.for_model(model_type, **config)
    cells = list(data[find_input_column(data)])
    images = InputProcessor(processing_class, model_config)(cells)["pixel_values"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageClassification.from_config(model_config)
        head = linear_head(model)
        if head is None:
            raise ValueError(
                f"`model_type` must have one linear layer as its head, got '{model_type}'. Use 'convnext'."
            )
        projector = nn.Sequential(
            nn.Linear(head.in_features, projection_size), nn.ReLU(), nn.Linear(projection_size, projection_size)
        )
        own = {id(parameter) for parameter in head.parameters()}
        learning = [p for p in (*model.parameters(), *projector.parameters()) if id(p) not in own]
        optimizer = torch.optim.Adam(learning, lr=learning_rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(steps):
            batch = images[torch.randint(len(images), (batch_size,))]
            views = torch.cat([_view(batch, noise, erase, shift, images.amin()) for _ in range(2)])
            loss = _vicreg_loss(*projector(_head_inputs(model, head, views)).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.eval().save_pretrained(partial)
        processing_class.save_pretrained(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _head_inputs(model: nn.Module, head: nn.Linear, pixel_values: torch.Tensor) -> torch.Tensor:
    captured: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    try:
        model(pixel_values=pixel_values)
    finally:
        hook.remove()
    return captured[0]


def _view(batch: torch.Tensor, noise: float, erase: float, shift: int, darkest: torch.Tensor) -> torch.Tensor:
    """Shift each image on its own, add noise and erase pixels; the channels share all three."""
    size, _, height, width = batch.shape
    padded = functional.pad(batch - darkest, (shift,) * 4) + darkest
    rows = torch.randint(2 * shift + 1, (size, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (size, 1)) + torch.arange(width)
    # Indexing with two index arrays around a slice puts the channels last.
    moved = padded[torch.arange(size)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    erased = torch.rand(size, 1, height, width) < erase
    return torch.where(erased, darkest, moved + noise * torch.randn(size, 1, height, width))


def _vicreg_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    loss = 25 * functional.mse_loss(first, second)
    for projection in (first, second):
        centred = projection - projection.mean(dim=0)
        loss = loss + 25 * functional.relu(1 - (centred.var(dim=0) + 1e-4).sqrt()).mean() / 2
        covariance = centred.T @ centred / (len(centred) - 1)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / centred.shape[1]
    return loss
