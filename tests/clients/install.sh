#!/usr/bin/env bash
# Install the client programs that tests/test_clients*.py run against the server, into this folder only: node_modules/ (with its own Node,
# because OpenClaw needs a newer one than most systems have), .venv/ and .venv-wyoming/.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}

# wyoming-openai needs Python 3.12 or newer. If there is none, uv downloads it.
newer_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.14 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[234].*/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo 3.12
}

# Return whether $1 was installed from exactly these files ($2 ...).
is_current() {
    local stamp=$1/.installed-from
    [ -f "$stamp" ] && cat "${@:2}" | cmp --silent - "$stamp"
}

install_python() {
    local folder=$1 requirements=$2
    is_current "$folder" "$requirements" && return
    "$uv" venv --quiet --clear --python "$(newer_python)" "$folder"
    # In another folder, because inside this project uv would apply the server's version constraints.
    (here=$PWD && cd / && "$uv" pip install --quiet --python "$here/$folder/bin/python" --requirement "$here/$requirements")
    cp "$requirements" "$folder/.installed-from"
}

# Without install scripts, so that nothing runs before a test starts it. npm's warnings about engines refer to the Node that runs npm, not to
# the one that runs the tests.
install_node() {
    is_current node_modules package.json && return
    if ! npm ping >/dev/null 2>&1; then
        echo "clients: npm or its registry cannot be reached; the tests of the npm clients will be skipped." >&2
        return
    fi
    npm install --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error
    cp package.json node_modules/.installed-from
}

install_python .venv requirements.txt
install_python .venv-wyoming requirements-wyoming.txt
install_node
