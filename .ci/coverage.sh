#!/usr/bin/env bash
# Lines and branches that the fast tests take; fails where a module below training (floors 1 to 3) has less than 95 %.
# Takes minutes, so it is for the night: `pip install -e ".[dev]" && .ci/coverage.sh`.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMP_NUM_THREADS=1 TQDM_DISABLE=1
python -m pytest -q -m "not slow" --cov --cov-report=
python -m coverage report
low=0
for module in $(cd tests && python -c "from test_architecture import FLOORS; print(*FLOORS[1], *FLOORS[2], *FLOORS[3])"); do
  python -m coverage report --include="hf_cosupervise/$module.py" --fail-under=95 > /dev/null || { echo "Low: $module"; low=1; }
done
exit $low
