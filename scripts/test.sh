#!/usr/bin/env bash
# Lint, imports, types, documentation, tests. Arguments go to pytest: scripts/test.sh -m "not slow" -k tree
set -euo pipefail
. "$(dirname "$0")/setup.sh"

lint() { ruff check . && ruff format --check . && lint-imports --no-logo; }
site() { NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet; }  # the variable turns off an announcement
triton() { scripts/triton.sh || echo "There is no Triton for this machine: its tests are left out." >&2; }

# Each of these uses at most one CPU, so they run side by side. The first that fails ends the script.
# mypy takes longest: the tests run beside it.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
mypy &
types=$!
lint & site & scripts/smollm2.sh > /dev/null & triton > /dev/null &
for job in $(jobs -p); do [ "$job" = $types ] || wait "$job"; done

MEDUSA_SMOLLM2_GGUF=$(scripts/smollm2.sh)
MEDUSA_TRITON=$(triton)
export MEDUSA_SMOLLM2_GGUF MEDUSA_TRITON
# A run of part of the tests keeps the bundles that it exports for later runs (tests/support/stock.py).
[ $# = 0 ] || export MEDUSA_TEST_STOCK="${MEDUSA_TEST_STOCK-$PWD/.cache/stock}"
# Each worker starts with its own part of the tests: fewer fixtures are made twice or waited for.
pytest --numprocesses "${MEDUSA_TEST_WORKERS:-2}" --dist worksteal --durations=20 "$@" &
for _ in mypy pytest; do wait -n; done
