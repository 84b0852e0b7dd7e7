"""The sweep over all classifiers: its table, and a part of what it sweeps over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
import sweep

# One of each kind of difficulty: parts side by side, heads of several layers, no token to pad with, an encoder and a
# decoder, an attention of its own, convolutions that are asked for their stride, logits by
# another name, weights that layers share, two heads in timm.
_SOME = {
    "image": ("clip", "siglip2", "dinov2", "mobilenet_v1", "pp_lcnet"),
    "text": ("distilbert", "gpt2", "t5", "modernbert", "qwen2"),
    "timm": ("test_vit", "test_efficientnet", "edgenext_xx_small"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in _SOME.items() for name in names])
def test_a_classifier_is_trained_exported_and_loaded_by_its_library(kind, name):
    case = next(case for case in sweep.find_cases([kind]) if case.name == name)
    sweep.run_case(case)
    # Which of them has to be compared in float64 hangs on the weights that were drawn.
    assert {name: state for name, (state, _) in case.results.items()} == dict.fromkeys(sweep.TRAININGS, sweep.WORKS)


def test_the_cases_are_all_classifiers():
    kinds = {kind: [case.name for case in sweep.find_cases([kind])] for kind in sweep.KINDS}
    assert {"clip", "vit", "hgnet_v2"} <= {*kinds["image"]} and {"bert", "llama"} <= {*kinds["text"]}
    assert len(kinds["timm"]) == len({*kinds["timm"]}) >= 50


def test_the_table_says_what_was_said_once(tmp_path, capsys, monkeypatch):
    known = {
        "image vit": {
            "results": dict.fromkeys(sweep.TRAININGS, (sweep.WORKS, "")),
            "differences": {"probe": 0.0, "lora": 2e-7},
        },
        "image clip": {"results": dict.fromkeys(sweep.TRAININGS, (sweep.REFUSED, "Not | so.")), "differences": {}},
    }
    path = tmp_path / "table.md"
    Path(f"{path}.json").write_text(json.dumps(known))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--names", "vit", "clip", "--output", str(path)])
    sweep.main()  # nothing is run again
    table = path.read_text()
    said = " ".join(table.split())
    assert "3 works, 3 refused, 0 wrong, 0 not made" in said
    assert "| vit | works | works | works |" in table and "| clip | refused [1] | refused [1] | refused [1] |" in table
    assert "1, is 0 (probe), 2e-07 (lora), 0 (full)." in said
    assert table.count("Not \\| so.") == 1
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--names", "nothing"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "must be models of ['image', 'text', 'timm'], got ['nothing']" in capsys.readouterr().err
