#!/bin/bash
# Sesame TTS as a service: launchd on a Mac, a systemd user unit on Linux. Safe to run again: that is how it is upgraded.
# Written for bash 3.2, the one that macOS has.
set -euo pipefail

LABEL="com.burkestudio.sesame-tts"
UNIT="sesame-tts.service"
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
PYTHON="$PROJECT/.venv/bin/python"
HELPER="$PROJECT/deploy/service.py"
SYSTEM="$(uname -s)"
DOMAIN="gui/$(id -u)"
PLIST="$HOME/Library/LaunchAgents/$LABEL.plist"
UNIT_FILE="${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/$UNIT"

ENVIRONMENT_GB=2    # .venv with its packages, and what uv keeps of them
HEALTH_SECONDS=60   # from the start to the first answer; a cold disk included
READY_SECONDS=120   # for CSM's weights to come from the disk
FAILED=1            # a check or a step failed
USAGE=2             # the command line, or a setting
NO_MANAGER=3        # nothing here runs services for a user

usage() {
    cat <<EOF
Usage: ./install.sh [--no-download]   install, or upgrade in place
       ./install.sh --status          is it running, and what does it say of itself
       ./install.sh --restart         stop it in order, and start it again (after a change in .env)
       ./install.sh --logs            the last lines of its logs; goes on with them on a terminal
       ./install.sh --uninstall       remove the service; voices, logs and models stay
       ./install.sh --render FOLDER   write the service files to look at; start and install nothing

  --no-download   leave Sesame's model for later: the server fetches it by itself when it first runs.

Exit status: 0 done, 1 a step failed, 2 wrong usage or a setting that cannot be used, 3 no service manager here.
EOF
}

say() { printf '%s\n' "$*"; }
step() { printf '==> %s\n' "$*"; }
warn() { printf 'Note: %s\n' "$*" >&2; }
fail() { # status message...
    local code="$1"
    shift
    printf 'install.sh: %s\n' "$*" >&2
    exit "$code"
}

on_mac() { [ "$SYSTEM" = "Darwin" ]; }

helper() { "$PYTHON" "$HELPER" "$@"; }

# ── What the machine must have ────────────────────────────────────────────────────────────────────────────────────────

check_mac() {
    local version
    version="$(sw_vers -productVersion)"
    if [ "$(uname -m)" != "arm64" ]; then
        if [ "$(sysctl -n hw.optional.arm64 2>/dev/null || true)" = "1" ]; then
            fail "$FAILED" "this terminal runs under Rosetta. Open one that does not (Get Info on the terminal app), or run: arch -arm64 ./install.sh"
        fi
        fail "$FAILED" "this Mac has an Intel processor; MLX, which runs the model, needs Apple Silicon."
    fi
    [ "${version%%.*}" -ge 14 ] || fail "$FAILED" "macOS $version is too old: MLX and onnxruntime need macOS 14 or newer."
    [ "$(id -u)" -ne 0 ] || fail "$FAILED" "run it as the user whose service it will be, without sudo."
}

check_linux() {
    command -v systemctl >/dev/null 2>&1 || fail "$NO_MANAGER" "there is no systemd here. 'make run' starts the server in the foreground; deploy/Dockerfile is for containers."
    systemctl --user show-environment >/dev/null 2>&1 || fail "$NO_MANAGER" \
        "systemd does not run services for this user (a container, or a session without one: try 'loginctl enable-linger' and a fresh login). 'make run' starts the server in the foreground; '--render FOLDER' writes the unit."
}

check_tools() {
    command -v make >/dev/null 2>&1 || fail "$FAILED" "make is missing. $(how_to_get_tools)"
    command -v uv >/dev/null 2>&1 || command -v python3 >/dev/null 2>&1 || fail "$FAILED" "neither uv nor python3 is here. $(how_to_get_tools)"
    if on_mac && ! xcode-select -p >/dev/null 2>&1; then
        fail "$FAILED" "Apple's command line tools are missing, and with them make. $(how_to_get_tools)"
    fi
}

how_to_get_tools() {
    if on_mac; then say "Run: xcode-select --install"; else say "Install make and python3 (with its venv module) through your distribution."; fi
}

# Whole gigabytes that are free where $1 will lie; its nearest parent that exists is asked.
free_gb() {
    local folder="$1"
    while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
    df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }'
}

check_space() { # folder gigabytes what-for
    local free
    free="$(free_gb "$1")"
    [ "$free" -ge "$2" ] || fail "$FAILED" "$3 needs $2 GB at $1, and $free GB are free."
}

# ── The steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────

make_environment() {
    step "Python environment with the pinned versions"
    [ -x "$PYTHON" ] || check_space "$PROJECT" "$ENVIRONMENT_GB" "the Python environment"
    make -C "$PROJECT" setup || fail "$FAILED" "the environment could not be made; the lines above say why. Running install.sh again goes on from there."
}

# URL, CACHE_DIR, STOP_SECONDS, WITH_CSM and OLD_PID, as the service will see them.
read_settings() {
    local facts
    facts="$(helper facts)" || exit "$?"
    {
        IFS= read -r URL
        IFS= read -r CACHE_DIR
        IFS= read -r STOP_SECONDS
        IFS= read -r WITH_CSM
        IFS= read -r OLD_PID
    } <<EOF
$facts
EOF
}

fetch_model() {
    step "Sesame's model"
    if [ "$WITH_CSM" = "-" ]; then
        say "Not on this machine (CSM in .env): the built-in voice speaks."
    elif [ "$DOWNLOAD" = "no" ]; then
        say "Left for later: the server fetches it when it first runs; /health shows how far it is."
    else
        helper fetch || fail "$FAILED" \
            "the model could not be fetched; the lines above say why. Running install.sh again resumes it, --no-download goes on without."
    fi
}

installed() { if on_mac; then [ -f "$PLIST" ]; else [ -f "$UNIT_FILE" ]; fi; }

loaded() {
    if on_mac; then
        launchctl print "$DOMAIN/$LABEL" >/dev/null 2>&1
    else
        systemctl --user is-active --quiet "$UNIT"
    fi
}

# launchctl's bootout returns before the service has ended, and a bootstrap that comes too early fails.
stop_on_mac() {
    local waited=0
    launchctl bootout "$DOMAIN/$LABEL" >/dev/null 2>&1 || true
    while launchctl print "$DOMAIN/$LABEL" >/dev/null 2>&1; do
        [ "$waited" -lt "$((STOP_SECONDS + 15))" ] || fail "$FAILED" "launchd did not end the running service within $waited seconds."
        sleep 1
        waited=$((waited + 1))
    done
}

start_on_mac() {
    local try
    launchctl enable "$DOMAIN/$LABEL" >/dev/null 2>&1 || true
    for try in 1 2 3; do
        if launchctl bootstrap "$DOMAIN" "$PLIST"; then return 0; fi
        say "launchd was not ready (try $try of 3)."
        sleep 2
    done
    fail "$FAILED" "launchd did not take the service. It needs you to be logged in at the Mac's own screen: a login over ssh alone has no $DOMAIN."
}

# Asked before the running service is stopped: a mistake in .env must not end it.
check_port() {
    local running=""
    if loaded; then running="yes"; fi
    helper port ${running:+--running} || exit "$?"
}

start_service() {
    if on_mac; then step "launchd service $LABEL"; else step "systemd user unit $UNIT"; fi
    check_port
    if on_mac; then
        if loaded; then stop_on_mac; fi
        helper render "$PLIST" || exit "$?"
        start_on_mac
    else
        helper render "$UNIT_FILE" || exit "$?"
        systemctl --user daemon-reload
        systemctl --user enable --quiet "$UNIT"
        systemctl --user restart "$UNIT"
        linger_hint
    fi
}

linger_hint() {
    local linger
    linger="$(loginctl show-user "$(id -un)" --property=Linger --value 2>/dev/null || true)"
    [ "$linger" = "yes" ] || warn "the service ends when you log out. To keep it: loginctl enable-linger $(id -un)"
}

wait_for_health() {
    step "Waiting for $URL/health"
    if [ "$OLD_PID" = "-" ]; then set --; else set -- --not-pid "$OLD_PID"; fi
    helper wait "$HEALTH_SECONDS" "$@" && return 0
    show_logs 20
    fail "$FAILED" "the server did not answer within $HEALTH_SECONDS seconds. The end of its logs is above; ./install.sh --status says more."
}

# With the default voice if its model comes up in time, else with the built-in one, which always can.
speak() {
    local sample="$CACHE_DIR/installed.wav" seconds="$READY_SECONDS"
    step "One sentence"
    if [ "$WITH_CSM" != "-" ] && [ "$DOWNLOAD" = "no" ]; then seconds=5; fi
    if helper ready "$seconds"; then
        helper speak "$sample" || fail "$FAILED" "the server runs, but could not speak. ./install.sh --logs says more."
    else
        say "Sesame is not ready yet (./install.sh --status says how far it is); the built-in voice speaks meanwhile."
        helper speak "$sample" --voice heart || fail "$FAILED" "the server runs, but could not speak. ./install.sh --logs says more."
    fi
    play "$sample"
}

play() {
    local player
    for player in afplay pw-play paplay aplay; do
        if command -v "$player" >/dev/null 2>&1; then
            "$player" "$1" >/dev/null 2>&1 || true
            return 0
        fi
    done
}

next_steps() {
    cat <<EOF

Sesame TTS runs at $URL and starts again by itself after a crash and at every login.

  Hear it in a browser:   $URL/
  Any OpenAI client:      base URL $URL/v1, any API key unless API_KEY is set in .env
  Settings:               copy .env.example to .env, change it, then ./install.sh --restart
  Upgrade:                git pull, then ./install.sh
  Logs:                   ./install.sh --logs   ($CACHE_DIR/server.log)
  Remove:                 ./install.sh --uninstall
EOF
}

# ── The commands ──────────────────────────────────────────────────────────────────────────────────────────────────────

install_service() {
    if on_mac; then check_mac; else check_linux; fi
    check_tools
    make_environment
    read_settings
    fetch_model
    start_service
    wait_for_health
    speak
    next_steps
}

need_environment() {
    [ -x "$PYTHON" ] || fail "$FAILED" "there is no environment yet. ./install.sh makes it and installs the service."
}

need_installed() {
    installed || fail "$FAILED" "the service is not installed. ./install.sh installs it."
}

show_status() {
    local state=0
    need_environment
    need_installed
    if on_mac; then
        say "Service file: $PLIST"
        if loaded; then
            launchctl print "$DOMAIN/$LABEL" | grep -E '^[[:space:]]*(state|pid|runs|last exit code) = ' || true
        else
            say "launchd has not loaded it."
            state="$FAILED"
        fi
    else
        say "Service file: $UNIT_FILE"
        systemctl --user --no-pager --lines=0 status "$UNIT" || state="$FAILED"
    fi
    helper status || state="$?"
    return "$state"
}

restart_service() {
    need_environment
    need_installed
    read_settings
    step "Restarting"
    check_port
    if on_mac; then
        # Not `kickstart -k`: bootout is known to send SIGTERM and to wait for ExitTimeOut, so that nothing being spoken is cut off.
        if loaded; then stop_on_mac; fi
        start_on_mac
    else
        systemctl --user restart "$UNIT"
    fi
    wait_for_health
    helper status
}

show_logs() { # lines [follow]
    local file files=()
    for file in "$CACHE_DIR/launchd.log" "$CACHE_DIR/server.log"; do
        if [ -f "$file" ]; then files+=("$file"); fi
    done
    if ! on_mac; then journalctl --user --unit "$UNIT" --lines 5 --no-pager 2>/dev/null || true; fi
    if [ "${#files[@]}" -eq 0 ]; then
        say "There is no log yet in $CACHE_DIR."
    elif [ "${2:-}" = "follow" ]; then
        exec tail -n "$1" -F "${files[@]}"
    else
        tail -n "$1" "${files[@]}"
    fi
}

logs() {
    need_environment
    read_settings
    if [ -t 1 ]; then show_logs 50 follow; else show_logs 50; fi
}

uninstall_service() {
    if ! installed && ! { on_mac && loaded; }; then
        say "The service is not installed; there is nothing to remove."
        return 0
    fi
    STOP_SECONDS=600 # the largest SHUTDOWN_TIMEOUT: launchd knows the right one, the environment may be gone
    if on_mac; then
        stop_on_mac
        rm -f "$PLIST"
    else
        systemctl --user disable --now --quiet "$UNIT" || true
        rm -f "$UNIT_FILE"
        systemctl --user daemon-reload || true
    fi
    cat <<EOF
The service is removed. What stays, until you delete it:
  voices, logs              CACHE_DIR of .env, $HOME/.cache/sesame-tts if none is set
  Sesame's model            Hugging Face's cache, $HOME/.cache/huggingface/hub if nothing else is set
  this folder               $PROJECT, with the Python environment in .venv
EOF
}

render_files() {
    check_tools
    make_environment
    helper render "$1/$LABEL.plist" "$1/$UNIT" || exit "$?"
    say "Written: $1/$LABEL.plist and $1/$UNIT"
}

main() {
    DOWNLOAD="yes"
    case "${1:-}" in
    "") install_service ;;
    --no-download)
        DOWNLOAD="no"
        install_service
        ;;
    --status) show_status ;;
    --restart) restart_service ;;
    --logs) logs ;;
    --uninstall) uninstall_service ;;
    --render)
        [ "$#" -eq 2 ] || fail "$USAGE" "--render needs a folder."
        render_files "$2"
        ;;
    --help | -h) usage ;;
    *)
        usage >&2
        exit "$USAGE"
        ;;
    esac
}

main "$@"
