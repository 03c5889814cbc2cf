#!/bin/bash
# Install Sesame TTS as a service: with launchd on a Mac, as a systemd user unit on Linux. Run it again to upgrade.
# Works with bash 3.2, the version of macOS.
set -euo pipefail

LABEL="com.burkestudio.sesame-tts"
UNIT="sesame-tts.service"
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
PYTHON="$PROJECT/.venv/bin/python"
HELPER="$PROJECT/deploy/service.py"
SYSTEM="$(uname -s)"
DOMAIN="gui/$(id -u)"
PLIST="$HOME/Library/LaunchAgents/$LABEL.plist"
QUICK_ACTION="$HOME/Library/Services/Speak with Sesame.workflow"
LINK="$HOME/.local/bin/sesame"
PBS="/System/Library/CoreServices/pbs" # lists the services of all programs
UNIT_FILE="${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/$UNIT"

ENVIRONMENT_GB=2    # .venv and uv's cache
HEALTH_SECONDS=60   # from the start to the first response, on a slow disk
INTERRUPTED=4       # exit status of the helper after Ctrl-C
FAILED=1            # a check or a step failed
USAGE=2             # wrong arguments, or an invalid setting
NO_MANAGER=3        # no service manager for this user

usage() {
    cat <<EOF
Usage: ./install.sh [--no-download]   install, or upgrade in place
       ./install.sh --status          show whether the service is running, and its health
       ./install.sh --restart         restart it gracefully (after a change in .env)
       ./install.sh --logs            show the last lines of the logs; on a terminal, follow them
       ./install.sh --link            link the command 'sesame' into ~/.local/bin
       ./install.sh --quick-action    put "Speak with Sesame" into the Services menu of a Mac: it reads selected text aloud
       ./install.sh --uninstall       remove the service; voices, logs and models are kept
       ./install.sh --render FOLDER   write the service files into FOLDER, without installing or starting the service

  --no-download   do not wait for the download of CSM-1B; the service makes it in the background.

Exit status: 0 success, 1 a step failed, 2 wrong arguments or an invalid setting, 3 no service manager.
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

# ── Requirements ──────────────────────────────────────────────────────────────────────────────────────────────────────

check_mac() {
    local version
    version="$(sw_vers -productVersion)"
    if [ "$(uname -m)" != "arm64" ]; then
        if [ "$(sysctl -n hw.optional.arm64 2>/dev/null || true)" = "1" ]; then
            fail "$FAILED" "this terminal runs under Rosetta. Turn Rosetta off for it (Get Info on the terminal app), or run: arch -arm64 ./install.sh"
        fi
        fail "$FAILED" "this Mac has an Intel processor; MLX, which runs CSM-1B, needs Apple Silicon."
    fi
    [ "${version%%.*}" -ge 14 ] || fail "$FAILED" "macOS $version is too old: MLX and onnxruntime need macOS 14 or newer."
    [ "$(id -u)" -ne 0 ] || fail "$FAILED" "run it as the user who will own the service, without sudo."
}

check_linux() {
    command -v systemctl >/dev/null 2>&1 || fail "$NO_MANAGER" "systemd is not installed. Run the server in the foreground with 'make run', or in a container with deploy/Dockerfile."
    systemctl --user show-environment >/dev/null 2>&1 || fail "$NO_MANAGER" \
        "systemd does not run services for this user. On a normal system, try 'loginctl enable-linger' and a new login. In a container, run the server in the foreground with 'make run'. '--render FOLDER' writes the unit file."
}

check_tools() {
    command -v make >/dev/null 2>&1 || fail "$FAILED" "make is not installed. $(tools_advice)"
    command -v uv >/dev/null 2>&1 || command -v python3 >/dev/null 2>&1 || fail "$FAILED" "neither uv nor python3 is installed. $(tools_advice)"
    if on_mac && ! xcode-select -p >/dev/null 2>&1; then
        fail "$FAILED" "Apple's command line tools, which include make, are not installed. $(tools_advice)"
    fi
}

tools_advice() {
    if on_mac; then say "Run: xcode-select --install"; else say "Install make and python3 (with its venv module) with your package manager."; fi
}

# Print the free space in whole gigabytes for folder $1, which may not exist yet.
free_gb() {
    local folder="$1"
    while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
    df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }'
}

check_space() { # folder gigabytes purpose
    local free
    free="$(free_gb "$1")"
    [ "$free" -ge "$2" ] || fail "$FAILED" "$3 needs $2 GB in $1, but only $free GB are free."
}

# macOS protects these folders: a program in the background gets no access until somebody allows it at the screen. Print the name of the one
# that folder $1 is in; nothing if it is in none.
protected_by() {
    local home
    home="$(cd "$HOME" && pwd -P)"
    case "$1/" in
    "$home/Desktop/"*) say "Desktop" ;;
    "$home/Documents/"*) say "Documents" ;;
    "$home/Downloads/"*) say "Downloads" ;;
    "$home/Library/Mobile Documents/"*) say "iCloud Drive" ;;
    "$home/Library/CloudStorage/"*) say "a cloud folder" ;;
    "/Volumes/"*) say "an external volume" ;;
    esac
}

check_project_folder() {
    local place
    place="$(protected_by "$PROJECT")"
    case "$place" in
    "") ;;
    "an external volume") warn "this folder is on $place. macOS asks at the screen whether Python may read it: allow that, or the service cannot start." ;;
    *) fail "$FAILED" "this folder is in $place ($PROJECT), which macOS does not let a service read. Move it and run install.sh again: mv \"$PROJECT\" ~/sesame-tts" ;;
    esac
}

check_data_folder() { # setting folder
    local place
    place="$(protected_by "$2")"
    [ -z "$place" ] || warn "$1 is in $place ($2). macOS asks at the screen whether Python may use it: allow that, or choose a folder elsewhere in your home folder."
}

# ── Steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

make_environment() {
    step "Python environment with the pinned versions"
    [ -x "$PYTHON" ] || check_space "$PROJECT" "$ENVIRONMENT_GB" "the Python environment"
    make -C "$PROJECT" setup || fail "$FAILED" "the Python environment could not be installed; see the messages above. Run install.sh again to continue."
}

# Set the variables below from the settings that the service will use.
read_settings() {
    local lines
    lines="$(helper describe)" || exit "$?"
    {
        IFS= read -r URL
        IFS= read -r STOP_SECONDS
        IFS= read -r WITH_CSM
        IFS= read -r OLD_PID
        IFS= read -r CACHE_DIR
        IFS= read -r DATA_DIR
        IFS= read -r MODEL_DIR
    } <<EOF
$lines
EOF
}

check_data_folders() {
    check_data_folder CACHE_DIR "$CACHE_DIR"
    check_data_folder DATA_DIR "$DATA_DIR"
    if [ "$WITH_CSM" != "-" ]; then check_data_folder HF_HOME "$MODEL_DIR"; fi
}

installed() { if on_mac; then [ -f "$PLIST" ]; else [ -f "$UNIT_FILE" ]; fi; }

loaded() {
    if on_mac; then
        launchctl print "$DOMAIN/$LABEL" >/dev/null 2>&1
    else
        systemctl --user is-active --quiet "$UNIT"
    fi
}

# Wait, because bootout returns before the service has ended, and bootstrap fails until then.
stop_on_mac() {
    local waited=0
    launchctl bootout "$DOMAIN/$LABEL" >/dev/null 2>&1 || true
    while launchctl print "$DOMAIN/$LABEL" >/dev/null 2>&1; do
        [ "$waited" -lt "$((STOP_SECONDS + 15))" ] || fail "$FAILED" "launchd did not stop the running service within $waited seconds."
        sleep 1
        waited=$((waited + 1))
    done
}

start_on_mac() {
    local attempt cause
    launchctl enable "$DOMAIN/$LABEL" >/dev/null 2>&1 || true
    for attempt in 1 2 3; do
        if launchctl bootstrap "$DOMAIN" "$PLIST"; then return 0; fi
        cause="$(bootstrap_cause)"
        [ -z "$cause" ] || fail "$FAILED" "launchd could not start the service. $cause"
        say "launchd could not start the service (attempt $attempt of 3)."
        sleep 2
    done
    fail "$FAILED" "launchd could not start the service. Possible causes:
- It is switched off in System Settings > General > Login Items & Extensions (shown as \"python\").
- A service with this name is still loaded: launchctl bootout $DOMAIN/$LABEL
- The service file is damaged: plutil $PLIST
- A device management profile forbids background items."
}

# Print why launchd could not start the service, if this Mac shows it.
bootstrap_cause() {
    if ! launchctl print "$DOMAIN" >/dev/null 2>&1; then
        say "Nobody is logged in at this Mac's screen, so there is no domain $DOMAIN: an ssh login alone does not create one."
        say "Log in at the screen or with Screen Sharing and run install.sh again. docs/SERVICE.md lists the choices for a Mac without a screen."
    elif launchctl print-disabled "$DOMAIN" 2>/dev/null | grep -q "\"$LABEL\" => \(disabled\|true\)"; then
        say "It is switched off: switch it on in System Settings > General > Login Items & Extensions (\"python\" or \"sesame-tts\"), then run install.sh again."
    fi
}

# Runs before the service is stopped, so that a mistake in .env does not end a running server.
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
    [ "$linger" = "yes" ] || warn "the service stops when you log out. To keep it running: loginctl enable-linger $(id -un)"
}

wait_for_health() {
    step "Waiting for $URL/health"
    if [ "$OLD_PID" = "-" ]; then set --; else set -- --not-pid "$OLD_PID"; fi
    helper wait "$HEALTH_SECONDS" "$@" && return 0
    show_logs 20
    fail "$FAILED" "the server did not answer within $HEALTH_SECONDS seconds. See the end of its logs above, and ./install.sh --status."
}

speak() { # file arguments...
    local sample="$CACHE_DIR/$1"
    shift
    helper speak "$sample" "$@" || fail "$FAILED" "the server runs, but could not speak. See ./install.sh --logs."
    play "$sample"
}

# Watch the download and the load that the service makes, and speak with CSM. On a Mac, caffeinate keeps it from sleeping meanwhile.
wait_for_csm() {
    local status=0 awake=""
    if [ "$WITH_CSM" = "-" ]; then return 0; fi
    step "CSM-1B"
    if [ "$DOWNLOAD" = "no" ]; then
        say "The service downloads and loads it in the background; ./install.sh --status shows the progress."
        return 0
    fi
    say "The service downloads and loads it now. Ctrl-C ends the watching, not the download."
    if on_mac && command -v caffeinate >/dev/null 2>&1; then awake="caffeinate -i"; fi
    # shellcheck disable=SC2086 # two words, or none
    $awake "$PYTHON" "$HELPER" watch "$HEALTH_SECONDS" || status="$?"
    case "$status" in
    0) speak installed-csm.wav ;;
    "$INTERRUPTED") ;;
    *) CSM_FAILED="yes" ;;
    esac
}

play() {
    local player
    for player in afplay pw-play paplay aplay; do
        if command -v "$player" >/dev/null 2>&1 && "$player" "$1" >/dev/null 2>&1; then return 0; fi
    done
    say "It could not be played here: no sound output, or no player (afplay, pw-play, paplay or aplay). Open the file yourself to hear it."
}

next_steps() {
    cat <<EOF

Sesame TTS runs at $URL. It starts at every login and restarts after a crash.

  Web page:         $URL/
  OpenAI clients:   base URL $URL/v1; any API key, unless API_KEY is set in .env
  Settings:         copy .env.example to .env, edit it, then run ./install.sh --restart
  Upgrade:          git pull, then ./install.sh
  Command line:     ./sesame "Hello", ./sesame --help
  Logs:             ./install.sh --logs   ($CACHE_DIR/server.log)
  Uninstall:        ./install.sh --uninstall
EOF
    if on_mac; then
        say ""
        say "If macOS asks whether Python may accept incoming connections: only other machines need that, this Mac does not."
    fi
}

# ── The command `sesame` ──────────────────────────────────────────────────────────────────────────────────────────────

linked() { [ "$(readlink "$LINK" 2>/dev/null || true)" = "$PROJECT/sesame" ]; }

link_command() {
    if ! linked && { [ -e "$LINK" ] || [ -L "$LINK" ]; }; then
        fail "$FAILED" "$LINK exists and is not a link to this folder. Remove it and run ./install.sh --link again."
    fi
    mkdir -p "$(dirname "$LINK")"
    ln -sf "$PROJECT/sesame" "$LINK"
    say "Linked: $LINK. Try: sesame \"Hello\""
    case ":$PATH:" in
    *":$(dirname "$LINK"):"*) ;;
    *) say "Your shell does not search ~/.local/bin yet. Add this line to ~/.zshrc (bash: ~/.bashrc): export PATH=\"\$HOME/.local/bin:\$PATH\"" ;;
    esac
}

offer_link() {
    local answer=""
    if linked || [ -e "$LINK" ]; then return 0; fi
    if [ -t 0 ] && [ -t 1 ]; then
        printf '\nLink the command %s into ~/.local/bin, so that it works in every folder? [y/N] ' "'sesame'"
        read -r answer || true
    fi
    case "$answer" in
    [yY]*) link_command ;;
    *) say "To use the command 'sesame' in every folder: ./install.sh --link" ;;
    esac
}

# The speech uses the running service, so that it starts at once; without one, `sesame` loads the voice itself.
quick_action() {
    on_mac || fail "$FAILED" "Quick Actions exist on a Mac only. Here, bind './sesame -' with the selection as its input to a key."
    check_project_folder
    check_tools
    make_environment
    helper quick_action "$QUICK_ACTION" || exit "$?"
    "$PBS" -flush >/dev/null 2>&1 || true
    say "Installed: $QUICK_ACTION"
    say "Select text in any program and choose Services > Speak with Sesame in the menu of the program or of the right mouse button."
    say "A key for it: System Settings > Keyboard > Keyboard Shortcuts > Services > Text. Programs that are running may show it only after their next start."
}

unlink_command() { if linked; then rm -f "$LINK"; fi; }

# ── Commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────

install_service() {
    if on_mac; then
        check_mac
        check_project_folder
    else
        check_linux
    fi
    check_tools
    make_environment
    read_settings
    if on_mac; then check_data_folders; fi
    start_service
    wait_for_health
    step "Test sentence"
    speak installed.wav --built-in
    wait_for_csm
    next_steps
    offer_link
    [ -z "$CSM_FAILED" ] || fail "$FAILED" \
        "the service runs with the built-in voice, but CSM-1B could not be loaded; see the message above. After a failed download the service tries again by itself and continues where it stopped."
}

need_environment() {
    [ -x "$PYTHON" ] || fail "$FAILED" "the Python environment is not installed. Run ./install.sh first."
}

need_installed() {
    installed || fail "$FAILED" "the service is not installed. Run ./install.sh first."
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
            say "The service is not loaded in launchd."
            state="$FAILED"
        fi
    else
        say "Service file: $UNIT_FILE"
        systemctl --user --no-pager --lines=0 status "$UNIT" || state="$FAILED"
    fi
    helper status || state="$?"
    if [ "$state" -eq "$FAILED" ]; then last_message; fi
    return "$state"
}

# A server that could not start has written its reason here. launchd does not start it again after an invalid setting or a port in use.
last_message() {
    local file
    read_settings
    file="$CACHE_DIR/launchd.log"
    if on_mac && [ -s "$file" ]; then
        say "The last message in $file:"
        tail -n 1 "$file"
        say "After a correction: ./install.sh --restart"
    fi
}

restart_service() {
    need_environment
    need_installed
    read_settings
    step "Restarting"
    check_port
    if on_mac; then
        # Not `kickstart -k`: bootout is known to send SIGTERM and to wait for ExitTimeOut, so that requests in progress can finish.
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
        say "There are no logs in $CACHE_DIR yet."
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

data_folder() { if on_mac; then say "$HOME/Library/Application Support/sesame-tts"; else say "${XDG_DATA_HOME:-$HOME/.local/share}/sesame-tts"; fi; }

uninstall_service() {
    unlink_command
    rm -rf "$QUICK_ACTION"
    if ! installed && ! { on_mac && loaded; }; then
        say "The service is not installed."
        return 0
    fi
    STOP_SECONDS=600 # the maximum of SHUTDOWN_TIMEOUT, because the settings can no longer be read if .venv was deleted
    if on_mac; then
        stop_on_mac
        rm -f "$PLIST"
    else
        systemctl --user disable --now --quiet "$UNIT" || true
        rm -f "$UNIT_FILE"
        systemctl --user daemon-reload || true
    fi
    cat <<EOF
The service is removed. These files are kept until you delete them:
  logs              CACHE_DIR from .env, by default $HOME/.cache/sesame-tts
  added voices      DATA_DIR from .env, by default $(data_folder)
  models            Hugging Face's cache, by default $HOME/.cache/huggingface/hub
  this folder       $PROJECT, with the Python environment in .venv
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
    CSM_FAILED=""
    case "${1:-}" in
    "") install_service ;;
    --no-download)
        DOWNLOAD="no"
        install_service
        ;;
    --status) show_status ;;
    --restart) restart_service ;;
    --logs) logs ;;
    --link) link_command ;;
    --quick-action) quick_action ;;
    --uninstall) uninstall_service ;;
    --render)
        [ "$#" -eq 2 ] || fail "$USAGE" "--render needs the name of a folder."
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
