#!/usr/bin/env bash
# Collects what a machine without a network lacks, in parts that can be carried one by one:
#   on that machine:  python3 -m pip list --format=freeze > have.txt
#   here:             scripts/wheelhouse.sh --python 3.12 --have have.txt --parts 56M wheelhouse
# --with FILE takes other files along, such as a model. docs/howto/gpu-offline.md says more.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec python scripts/wheelhouse.py "$@"
