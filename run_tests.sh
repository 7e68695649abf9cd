#!/usr/bin/env bash
# Checks style and types, then runs all tests; arguments go to pytest: ./run_tests.sh -k probe
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/environment.sh"
cd "$root"
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest "$@"
