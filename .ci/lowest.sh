#!/usr/bin/env bash
# What a user gets, in the folder that is named: the source has recipes and tests, and the wheel made from it passes the
# core of these tests away from any checkout, at the lowest versions that it allows.
set -euo pipefail
python3 .ci/lowest.py > "$1/lowest.txt"
python3 -m venv "$1/lowest"
source "$1/lowest/bin/activate"
pip install --quiet build
python -m build --outdir "$1/dist" > /dev/null
cd "$1"
tar -xzf dist/*.tar.gz
rm -r hf_cosupervise-*/hf_cosupervise # only the wheel can be imported from here on
pip install --quiet --constraint lowest.txt "$(echo dist/*.whl)[test]"
cd hf_cosupervise-*/recipes
python -c "import hf_cosupervise; [getattr(hf_cosupervise, name) for name in hf_cosupervise.__all__]"
cd ../tests
pytest -m "core and not slow"
