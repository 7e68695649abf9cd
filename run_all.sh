#!/usr/bin/env bash
# Does SAM know what it segments? Runs the study's notebooks and leaves figures, tables and a report.
#
# Usage: ./run_all.sh [options]
#
#   --scale NAME        pocket (default; two cores, no network), lite (fetches weights and data, then runs 01-04) or
#                       paper (01-04 on your ImageNet and COCO: --data, --references, --targets, --images)
#   --quick             the pocket scale from small samples, in some four minutes: for a first look, marked as such
#                       in every figure (figures/quick/)
#   --only NAME ...     these notebooks only, by number or name: --only 01 03
#   --fresh             first empty this scale's caches: everything is computed again
#   --student           only write the notebooks without the exercises' solutions, into student/
#   --seed N            another seed than the notebooks' own
#   --data DIR          your own images, a sub-folder for each class (notebook 05, or 01)
#   --references FILE   your own reference instances, COCO JSON or a folder of labelme or SA-1B files (notebook 05, or
#                       02 and 03; 02 also tunes on them)
#   --targets FILE      your own target images: the same, or a folder of images (annotations may be missing, but for 02)
#   --images DIR        the folder of the images that both name
#   --target-images DIR the folder of the targets' images, where it is another (notebook 05)
#   --weights NAME      zoo, official or random (official models, untrained) instead of the scale's
#   --shots N           references per class (notebook 05, as all that follow)
#   --min-area N        references must be larger, pixels of a photograph of 640x480 (default 1024)
#   --min-score X       instances that score less are neither drawn nor exported
#   --skip-bad-images   leave out all images that are missing, damaged or of another size than the file says
#   --help              this text
#
# Results: figures/<scale>/index.html, .png and .csv beside it, executed notebooks in figures/<scale>/notebooks/; of
# your own data in figures/<scale>/own_data/, so that the scale's results stay (at paper, yours are the scale's).
# Computed features and models: .cache/<scale>/. Exit code: 0, or 1 when anything failed, or 2 for a wrong option.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$root/run_all.sh"
    exit ;;
esac
source "$root/scripts/environment.sh"
exec "$python" -m samantics run "$@"
