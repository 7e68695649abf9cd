#!/usr/bin/env bash
# Runs the study. What it takes and leaves: ./run_all.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*)
    sed -n '1s/"""//; 1,/^"""/{/^"""/!p}' "$root/scripts/study.py" # its documentation is the help text
    exit ;;
esac
source "$root/scripts/environment.sh"
exec "$python" "$root/scripts/study.py" "$@"
