#!/usr/bin/env bash
# Installs the programs of other people that tests/test_clients*.py run against the server, into this folder and nowhere else:
# node_modules/ (with a Node of its own, because OpenClaw needs a newer one than most systems have), .venv/ and .venv-wyoming/.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}

# wyoming-openai is written in Python 3.12's syntax. Where there is no such Python, uv fetches one.
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

# Whether $1 was installed from just these files ($2 ...); if not, it is installed anew.
is_current() {
    local stamp=$1/.installed-from
    [ -f "$stamp" ] && cat "${@:2}" | cmp --silent - "$stamp"
}

install_python() {
    local folder=$1 requirements=$2
    is_current "$folder" "$requirements" && return
    "$uv" venv --quiet --clear --python "$(newer_python)" "$folder"
    # From elsewhere, because in this project uv would hold them to the server's own versions.
    (here=$PWD && cd / && "$uv" pip install --quiet --python "$here/$folder/bin/python" --requirement "$here/$requirements")
    cp "$requirements" "$folder/.installed-from"
}

# Without scripts: nothing that is installed here may run before a test starts it. The engines that npm warns of are the Node it
# runs on itself, not the one the tests run.
install_node() {
    is_current node_modules package.json && return
    if ! npm ping >/dev/null 2>&1; then
        echo "clients: npm, or its registry, cannot be reached; the tests of the clients from npm will be skipped." >&2
        return
    fi
    npm install --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error
    cp package.json node_modules/.installed-from
}

install_python .venv requirements.txt
install_python .venv-wyoming requirements-wyoming.txt
install_node
